"""`python -m benchmarks.micro`: builds the micro model, measures it, and proves what the demo has taught it."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.micro.build import build
from benchmarks.micro.judge import measure
from benchmarks.micro.proof import prove
from benchmarks.micro.recipe import Recipe
from hyimg.errors import HyimgError
from hyimg.memory.device import resolve_device
from hyimg.report import ConsoleReporter


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code; errors go to stderr as those of `hyimg` do."""
    given = _parser().parse_args(arguments)
    report = ConsoleReporter()
    try:
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        if given.command == "build":
            device = resolve_device(given.device)
            build(given.directory, _recipe(given), report, resume=given.resume, device=device)
        elif given.command == "prove":
            prove(given.directory, report, num_seeds=given.seeds)
        else:
            measure(
                given.directory,
                report,
                num_prompts=given.prompts,
                num_vae_pictures=given.vae_pictures,
                infer_arguments=shlex.split(given.infer),
            )
    except HyimgError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        hint = "; `--resume` goes on" if given.command == "build" else ""
        print(f"error: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _recipe(given: argparse.Namespace) -> Recipe:
    recipe = Recipe(seed=given.seed, num_pictures=given.pictures)
    return replace(
        recipe,
        vae=replace(recipe.vae, steps=given.vae_steps, batch_size=given.vae_batch_size),
        dit=replace(recipe.dit, steps=given.dit_steps, batch_size=given.dit_batch_size),
    )


def _positive_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not `{text}`")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    usual = Recipe()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    making = commands.add_parser("build", help="train the micro model from nothing")
    making.add_argument("--resume", action="store_true", help="go on with the build in the folder")
    making.add_argument("--device", default="cpu", help="cpu or cuda")
    making.add_argument("--seed", type=int, default=usual.seed, help="of the weights, pictures and draws (0)")
    for flag, value, what in (
        ("--vae_steps", usual.vae.steps, "training steps of the VAE"),
        ("--vae_batch_size", usual.vae.batch_size, "pictures a step"),
        ("--pictures", usual.num_pictures, "pictures that the DiT is trained on"),
        ("--dit_steps", usual.dit.steps, "training steps of the DiT"),
        ("--dit_batch_size", usual.dit.batch_size, "pictures a step"),
    ):
        making.add_argument(flag, type=_positive_number, default=value, help=f"{what} ({value})")

    judging = commands.add_parser("measure", help="render held-out prompts and judge the pictures")
    judging.add_argument("--prompts", type=_positive_number, default=200, help="held-out prompts (200)")
    judging.add_argument(
        "--vae_pictures", type=_positive_number, default=200, help="pictures that the VAE reconstructs (200)"
    )
    judging.add_argument(
        "--infer",
        default="",
        metavar="FLAGS",
        help='more flags of `hyimg infer`, such as "--guidance_scale 1"',
    )

    proving = commands.add_parser("prove", help="judge what the demo's LoRA has taught")
    proving.add_argument(
        "--seeds", type=_positive_number, default=100, help="pictures of each comparison (100)"
    )
    proving.add_argument("directory", type=Path, help="folder of `hyimg demo`")
    proving.set_defaults(threads=None)  # what takes time are processes of their own

    for command in (making, judging):
        command.add_argument("directory", type=Path, help="the model's folder")
        command.add_argument("--threads", type=_positive_number, help="threads of torch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
