"""`python -m hyimg.micro measure`: how well a micro model does what it was trained for, as `measures.json`.

Prompts that were never trained are rendered by `hyimg infer` with its default steps and guidance, and judged; so are as
many empty prompts with the same seeds, which must do no better than chance. The VAE reconstructs held-out pictures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from hyimg.cache.atomic import atomic_write_text
from hyimg.errors import RunError
from hyimg.flow.pictures import decode_image
from hyimg.micro.judge import Verdict, judge
from hyimg.micro.world import NUM_FULL_PHRASINGS, PICTURE_SIDE, Scene, draw, held_out_scenes, phrase
from hyimg.model.folder import ModelFolder
from hyimg.model.loading import load_vae
from hyimg.report import Reporter

MEASURES = "measures.json"

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

    `infer_arguments` are more flags of `hyimg infer`, and stand in the measures.
    """
    folder = ModelFolder(directory)
    scenes = held_out_scenes(num_prompts)
    prompts = [phrase(scene, number % NUM_FULL_PHRASINGS) for number, scene in enumerate(scenes)]
    measures: dict[str, object] = {
        "prompts": num_prompts,
        "infer_arguments": list(infer_arguments),
        "vae_psnr": reconstruction_psnr(folder, scenes[:num_vae_pictures]),
        "with_prompt": score(scenes, verdicts(folder, prompts, *infer_arguments)),
        "prompt_emptied": score(scenes, verdicts(folder, [""] * num_prompts, *infer_arguments)),
    }
    atomic_write_text(directory / MEASURES, json.dumps(measures, indent=1) + "\n")
    report.note(json.dumps(measures, indent=1))
    return measures


def score(scenes: Sequence[Scene], found: Sequence[Verdict]) -> dict[str, float]:
    """Shares of pictures in which what is named is right; `letter` of the scenes that have one."""
    pairs = list(zip(scenes, found, strict=True))
    shares = {
        name: _share([verdict.right(scene, aspects) for scene, verdict in pairs])
        for name, aspects in SCORES.items()
    }
    quoting = [verdict.right(scene, ("letter",)) for scene, verdict in pairs if scene.letter is not None]
    silent = [verdict.right(scene, ("letter",)) for scene, verdict in pairs if scene.letter is None]
    return {**shares, "letter": _share(quoting), "no_letter_unasked": _share(silent)}


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4) if right else float("nan")


def verdicts(folder: ModelFolder, prompts: Sequence[str], *arguments: str) -> list[Verdict]:
    """What `hyimg infer` renders of the prompts, image i with seed i, judged; `arguments` are more of its flags.

    Raises RunError where the command fails.
    """
    with TemporaryDirectory() as scratch:
        listing, results = Path(scratch) / "prompts.json", Path(scratch) / "pictures"
        requests = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
        listing.write_text(json.dumps(requests), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "hyimg",
            "infer",
            "--from_file",
            str(listing),
            "--save_path",
            str(results),
        ]
        command += ["--image_size", str(PICTURE_SIDE), str(PICTURE_SIDE), *arguments]
        command += [word for option, path in folder.files().items() for word in (f"--{option}", str(path))]
        if subprocess.run(command, check=False).returncode != 0:
            raise RunError("`hyimg infer` failed", hint="its message stands above")
        paths = sorted(results.glob("*.png"))
        assert len(paths) == len(prompts)
        return [judge(Image.open(path)) for path in paths]


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
