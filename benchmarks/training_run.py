"""`hyimg train` of a mid-size DiT as a process: from its start to the first step, and what the loop adds to the model.

The model of `training_step` as a file, images whose caches are full, a LoRA of rank 16, AdamW, batch 1, 128 text
tokens. A plugin (`benchmarks.probe`) takes the times inside the run: of every step, as it is from one to the
next, the forward and the backward pass, and the optimiser. The rest is the loop's: loading the batch, noise and
timesteps, the loss, norms, metrics, hooks.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.figures import HYIMG, Figure, Options, apart
from benchmarks.models import MID, NUM_TEXT, RANK, TOY, write_dit
from benchmarks.samples import synthesise
from hyimg.checkpoints.architecture import SPATIAL_FACTOR

SIDES = (16, 32, 64)
NUM_IMAGES = 20
# the first steps warm caches up
NUM_WARM = 2
_PRECISIONS = {"fp32": "no", "bf16": "bf16"}


def measure(options: Options) -> Iterator[Figure]:
    """Two figures a size and precision: a step and the loop's share of it, and the start of the run."""
    arch = TOY if options.toy else MID
    dit = options.scratch / "dit.safetensors"
    apart(write_dit, dit, arch)
    for side in (4,) if options.toy else SIDES:
        latent = (arch.latent_channels, side, side)
        folder = options.scratch / f"side{side}"
        pixels = side * SPATIAL_FACTOR
        dataset = apart(synthesise, folder, NUM_IMAGES, pixels, latent, (NUM_TEXT, arch.text_dim))
        for precision, mixed_precision in _PRECISIONS.items():
            name = f"{side**2} tokens, {precision}"
            if options.only not in name:
                continue
            num_steps = NUM_WARM + (2 if options.toy else max(3, 8 // (side // 16) ** 2))
            told = run(dit, dataset, folder / precision, num_steps, mixed_precision, options.device)
            yield from _figures(name, told)


def run(
    dit: Path, dataset: Path, output_dir: Path, num_steps: int, mixed_precision: str, device: str
) -> dict[str, list[float]]:
    """What the probe has written: seconds by step, and the start's."""
    probe = output_dir.with_suffix(".json")
    arguments = ["train", "--dit", dit, "--dataset_config", dataset, "--output_dir", output_dir]
    arguments += ["--max_train_steps", num_steps, "--mixed_precision", mixed_precision, "--device", device]
    arguments += ["--network_dim", RANK, "--network_alpha", RANK, "--learning_rate", 1e-4, "--seed", 1]
    arguments += ["--plugin", "benchmarks.probe"]
    environment = {**os.environ, "HYIMG_PROBE": str(probe)}
    subprocess.run([*HYIMG, *map(str, arguments)], check=True, stderr=subprocess.DEVNULL, env=environment)
    told: dict[str, list[float]] = json.loads(probe.read_text())
    return told


def _figures(name: str, told: dict[str, list[float]]) -> Iterator[Figure]:
    steps = {what: told[what][NUM_WARM:] for what in ("step", "forward", "backward", "optimizer")}
    middle = {what: median(times) for what, times in steps.items()}
    models = [
        forward + backward for forward, backward in zip(steps["forward"], steps["backward"], strict=True)
    ]
    loop = median(
        (step - model - optimizer) / model
        for step, model, optimizer in zip(steps["step"], models, steps["optimizer"], strict=True)
    )
    optimizer = median(own / model for own, model in zip(steps["optimizer"], models, strict=True))
    yield Figure(
        f"{name}, a step of the run",
        middle["step"],
        beside=f"the loop adds {loop:.1%} to forward and backward (goal 2%), the optimiser {optimizer:.1%}",
        values={**middle, "loop_share": loop, "optimizer_share": optimizer},
    )
    to_run, to_step = told["to_run_start"][0], told["to_first_step"][0]
    yield Figure(
        f"{name}, process start to the end of the first step",
        to_step,
        beside=f"{to_run:.1f} s to the loop, model loaded",
        values={"to_run_start": to_run, "to_first_step": to_step},
    )
