"""`python -m hyimg.micro measure`: how well a micro model does what it was trained for, as `measures.json`.

Prompts that were never trained are rendered by `hyimg infer` with its default steps, and judged; so are as many empty
prompts with the same seeds, which must do no better than chance. The VAE reconstructs held-out pictures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from hyimg.cache.atomic import atomic_write_text
from hyimg.errors import HyimgError, RunError
from hyimg.flow.pictures import decode_image
from hyimg.micro.judge import Verdict, judge
from hyimg.micro.world import NUM_FULL_PHRASINGS, PICTURE_SIDE, Scene, draw, held_out_scenes, phrase
from hyimg.model.folder import ModelFolder
from hyimg.model.loading import load_vae
from hyimg.report import Reporter

MEASURES = "measures.json"

FLAGS = ("--guidance_scale", "1")
"""The micro model is rendered without guidance: the default scale exaggerates what its few latent values say."""

NUM_FIRST = 40
"""Of these prompts the scores are told apart too, so that a test can repeat them in less time."""

GOAL = ("shape", "color", "background")
"""What must be right in a picture for it to count."""
SCORES: Mapping[str, Sequence[str]] = {
    "shape_and_colors": GOAL,
    "shape": ("shape",),
    "color": ("color",),
    "background": ("background",),
    "position": ("position",),
    "size": ("size",),
    "all": (*GOAL, "position", "size"),
}


def measure(
    directory: Path,
    report: Reporter,
    *,
    num_prompts: int = 200,
    num_vae_pictures: int = 200,
    infer_arguments: Sequence[str] = (),
) -> dict[str, object]:
    """Measures the model of a folder, writes the measures there, and returns them.

    `infer_arguments` are more flags of `hyimg infer`, and stand in the measures. Raises HyimgError where a file of the
    model is missing, RunError where rendering fails.
    """
    folder = ModelFolder(directory)
    for path in (*folder.files().values(), folder.tokenizer):
        if not path.is_file():
            raise HyimgError(f"there is no `{path}`", hint="give the folder of a build that has ended")
    scenes = held_out_scenes(num_prompts)
    prompts = [phrase(scene, number % NUM_FULL_PHRASINGS) for number, scene in enumerate(scenes)]
    report.note(f"1 of 2: {num_prompts} held-out prompts")
    found = verdicts(folder, prompts, *infer_arguments)
    report.note("2 of 2: as many empty prompts")
    emptied = verdicts(folder, [""] * num_prompts, *infer_arguments)
    measures: dict[str, object] = {
        "prompts": num_prompts,
        "infer_arguments": [*FLAGS, *infer_arguments],
        "vae_psnr": reconstruction_psnr(folder, scenes[:num_vae_pictures]),
        "with_prompt": score(scenes, found),
        "with_first_prompts": {
            "prompts": len(found[:NUM_FIRST]),
            **score(scenes[:NUM_FIRST], found[:NUM_FIRST]),
        },
        "prompt_emptied": score(scenes, emptied),
    }
    text = json.dumps(measures, indent=1, allow_nan=False)
    atomic_write_text(directory / MEASURES, text + "\n")
    report.note(text)
    return measures


def score(scenes: Sequence[Scene], found: Sequence[Verdict]) -> dict[str, float]:
    """Shares of pictures in which what is named is right.

    `letter` is of the scenes that have one and `no_letter_unasked` of the others, each only where there are such.
    """
    pairs = list(zip(scenes, found, strict=True))
    right = {
        name: [verdict.right(scene, aspects) for scene, verdict in pairs] for name, aspects in SCORES.items()
    }
    for name, is_quoted in (("letter", True), ("no_letter_unasked", False)):
        right[name] = [
            verdict.right(scene, ("letter",))
            for scene, verdict in pairs
            if (scene.letter is not None) == is_quoted
        ]
    return {name: round(fmean(all_), 4) for name, all_ in right.items() if all_}


def verdicts(
    folder: ModelFolder, prompts: Sequence[str], *arguments: str, quiet: bool = False
) -> list[Verdict]:
    """What is to be seen on the pictures that `render` makes."""
    return [judge(picture) for picture in render(folder, prompts, *arguments, quiet=quiet)]


def render(
    folder: ModelFolder, prompts: Sequence[str], *arguments: str, quiet: bool = False
) -> list[Image.Image]:
    """What `hyimg infer` makes of the prompts, image i with seed i; `arguments` are more of its flags
    than `FLAGS`, which they may change. `quiet` keeps back what it prints.

    Raises RunError where the command fails.
    """
    with TemporaryDirectory() as scratch:
        listing, results = Path(scratch) / "prompts.json", Path(scratch) / "pictures"
        requests = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
        listing.write_text(json.dumps(requests), encoding="utf-8")
        command = [sys.executable, "-m", "hyimg", "infer", "--from_file", str(listing)]
        command += ["--save_path", str(results), "--image_size", str(PICTURE_SIDE), str(PICTURE_SIDE)]
        command += [word for option, path in folder.files().items() for word in (f"--{option}", str(path))]
        done = subprocess.run([*command, *FLAGS, *arguments], check=False, capture_output=quiet, text=True)
        if done.returncode != 0:
            raise RunError(
                "`hyimg infer` failed", hint=done.stderr.strip() if quiet else "its message stands above"
            )
        paths = sorted(results.glob("*.png"))
        assert len(paths) == len(prompts)
        return [Image.open(path).convert("RGB") for path in paths]


@torch.no_grad()
def reconstruction_psnr(folder: ModelFolder, scenes: Sequence[Scene]) -> float:
    """Mean PSNR (dB) of pictures that are encoded to the posterior's mean and decoded, in float32, to 8 bits."""
    vae = load_vae(folder.vae, dtype=torch.float32)
    total = 0.0
    for number, scene in enumerate(scenes):
        picture_HWC = torch.from_numpy(draw(scene, "psnr", number))
        image_BCHW = picture_HWC.permute(2, 0, 1)[None].float() / 127.5 - 1
        decoded = decode_image(vae, vae.encode(image_BCHW).mean_BCHW)
        difference = (
            torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8).view_as(picture_HWC).float()
        )
        error = (difference - picture_HWC.float()).square().mean().clamp(min=1e-3)
        total += float(10 * torch.log10(255**2 / error))
    return round(total / len(scenes), 2)
