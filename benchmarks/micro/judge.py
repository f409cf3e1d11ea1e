"""What a picture of the small world shows, found without learning: colours by their nearest, shapes by overlap.

A picture is judged as it is: noise, blur and the damage of compression are smoothed away first, and where nothing
fits, None is the answer.

Shapes: H W pixels

`python -m benchmarks.micro measure`: how well a micro model does what it was trained for, as `measures.json`.

Prompts that were never trained are rendered by `hyimg infer` with its default steps, and judged; so are as many empty
prompts with the same seeds, which must do no better than chance. The VAE reconstructs held-out pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter

from hyimg.cache.atomic import atomic_write_text
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.config.image_file import opened_image
from hyimg.demo.world import (
    COLORS,
    LETTER_CELL,
    LETTERS,
    NEW_SHAPES,
    NUM_FULL_PHRASINGS,
    PICTURE_SIDE,
    POSITIONS,
    SHAPES,
    SIZES,
    STEP,
    Scene,
    draw,
    draw_shape,
    held_out_scenes,
    letter_layer,
    phrase,
    unit_area,
    unit_centroid,
)
from hyimg.distributed.launch import run_command
from hyimg.errors import HyimgError, RunError
from hyimg.model.loading import load_vae
from hyimg.rendering.decoding import decode_image
from hyimg.report import Reporter

Levels = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Pixels at the border that no shape covers, of which the background's colour is taken
_BORDER = 5
# A pixel is another colour's from this distance to the background's on (levels, Euclidean)
_MIN_DISTANCE = 50.0
# How far from a colour of the world (levels, Euclidean) one may be and have its name
_MAX_SHADE = 75.0
_MIN_AREA = 150
# Intersection over union of a region with the shape that it is called
_MIN_OVERLAP = 0.75
# Correlation of the corner with the letter that it is called
_MIN_CORRELATION = 0.6
_LETTER_SHIFTS = range(-3, 4)


@dataclass(frozen=True)
class Verdict:
    """What a picture shows, in the words of `Scene`; None for what has no name in the small world."""

    shape: str | None
    color: str | None
    background: str | None
    position: str | None
    size: str | None
    letter: str | None

    def right(self, scene: Scene, names: Sequence[str]) -> bool:
        """Whether the picture shows the scene, as far as the fields of these names tell."""
        return all(getattr(self, name) == getattr(scene, name) for name in names)


ASPECTS = tuple(field.name for field in fields(Verdict))


def judge(picture: Image.Image) -> Verdict:
    """The verdict on an RGB picture of 128x128 pixels."""
    assert picture.size == (PICTURE_SIDE, PICTURE_SIDE), picture.size
    smooth = picture.convert("RGB").filter(ImageFilter.MedianFilter(3))
    image_HWC = np.asarray(smooth, dtype=np.float64)
    corner_HW = np.zeros((PICTURE_SIDE, PICTURE_SIDE), dtype=bool)
    corner_HW[LETTER_CELL:, LETTER_CELL:] = True

    border_HW = np.ones_like(corner_HW)
    border_HW[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    background = np.median(image_HWC[border_HW & ~corner_HW], axis=0)
    distance_HW = np.linalg.norm(image_HWC - background, axis=2)
    letter = _letter(distance_HW)
    region_HW = _largest_region((distance_HW > _threshold(distance_HW[~corner_HW])) & ~corner_HW)
    if region_HW.sum() < _MIN_AREA:
        return Verdict(None, None, _color_name(background), None, None, letter)
    shape, radius = _shape(region_HW)
    return Verdict(
        shape=shape,
        color=_color_name(np.median(image_HWC[_core(region_HW)], axis=0)),
        background=_color_name(background),
        position=_position(region_HW, shape, radius),
        size=min(SIZES, key=lambda name: abs(SIZES[name] - radius)) if shape is not None else None,
        letter=letter,
    )


def _color_name(color: Levels) -> str | None:
    distances = {name: float(np.linalg.norm(color - np.array(levels))) for name, levels in COLORS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= _MAX_SHADE else None


def _threshold(distances: Levels) -> float:
    """Half of the way to what stands out most."""
    return max(_MIN_DISTANCE, 0.5 * float(np.percentile(distances, 98)))


def _core(region_HW: Mask) -> Mask:
    """The region without its rim, where colours mix; the region where it is all rim."""
    padded = np.pad(region_HW, 2)
    shifts = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 0), (0, 2), (2, 4), (4, 2)]
    side = PICTURE_SIDE
    core_HW = region_HW & np.all([padded[y : y + side, x : x + side] for y, x in shifts], axis=0)
    return core_HW if core_HW.any() else region_HW


def _largest_region(mask_HW: Mask) -> Mask:
    """The largest connected part of a mask (four neighbours); all false where the mask is."""
    # Each pixel takes the highest number among its neighbours until none changes
    labels_HW = np.where(mask_HW, np.arange(1, mask_HW.size + 1).reshape(mask_HW.shape), 0)
    while True:
        padded = np.pad(labels_HW, 1)
        neighbors = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        spread_HW = np.where(mask_HW, np.maximum.reduce([labels_HW, *neighbors]), 0)
        if np.array_equal(spread_HW, labels_HW):
            break
        labels_HW = spread_HW
    sizes = np.bincount(labels_HW.ravel())
    sizes[0] = 0
    return labels_HW == sizes.argmax() if sizes.any() else np.zeros_like(mask_HW)


def _centroid(region_HW: Mask) -> tuple[float, float]:
    down, right = np.nonzero(region_HW)
    return float(right.mean()) + 0.5, float(down.mean()) + 0.5


def _shape(region_HW: Mask) -> tuple[str | None, float]:
    """The shape that covers the region best when it is drawn there with the same area, and its radius."""
    area, (right, down) = float(region_HW.sum()), _centroid(region_HW)
    best: tuple[float, str, float] = (0.0, "", 0.0)
    for name in (*SHAPES, *NEW_SHAPES):
        radius = (area / unit_area(name)) ** 0.5
        off_right, off_down = unit_centroid(name)
        center = (right - off_right * radius, down - off_down * radius)
        drawn_HW = draw_shape(name, center, radius, PICTURE_SIDE) > 0.5
        overlap = float((drawn_HW & region_HW).sum() / (drawn_HW | region_HW).sum())
        best = max(best, (overlap, name, radius))
    overlap, name, radius = best
    return (name if overlap >= _MIN_OVERLAP else None), radius


def _position(region_HW: Mask, shape: str | None, radius: float) -> str:
    """The position that the shape's middle is nearest to."""
    right, down = _centroid(region_HW)
    if shape is not None:
        off_right, off_down = unit_centroid(shape)
        right, down = right - off_right * radius, down - off_down * radius
    middle = PICTURE_SIDE / 2

    def distance(name: str) -> float:
        across, along = POSITIONS[name]
        return float(np.hypot(right - middle - STEP * across, down - middle - STEP * along))

    return min(POSITIONS, key=distance)


def _letter(distance_HW: Levels) -> str | None:
    """The letter whose strokes the corner's contrast follows best, at any of a few shifts."""
    corner_HW = distance_HW[LETTER_CELL:, LETTER_CELL:]
    if np.percentile(corner_HW, 90) < _MIN_DISTANCE:
        return None
    best = (0.0, "")
    for letter in LETTERS:
        layer_HW = letter_layer(letter)
        for down in _LETTER_SHIFTS:
            for right in _LETTER_SHIFTS:
                shifted = np.roll(layer_HW, (down, right), axis=(0, 1))[LETTER_CELL:, LETTER_CELL:]
                best = max(best, (float(np.corrcoef(shifted.ravel(), corner_HW.ravel())[0, 1]), letter))
    correlation, letter = best
    return letter if correlation >= _MIN_CORRELATION else None


MEASURES = "measures.json"

FLAGS = ("--guidance_scale", "1")
"""The micro model is rendered without guidance: the default scale exaggerates what its few latent values say."""

NUM_FIRST = 20
"""The scores of these prompts are also reported separately, so that a test can repeat them in less time."""
NUM_FIRST_PICTURES = 20
"""Of these pictures the reconstruction's PSNR is given apart, for the same reason."""

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
        "vae_psnr_first": reconstruction_psnr(folder, scenes[: min(num_vae_pictures, NUM_FIRST_PICTURES)]),
        "with_prompt": score(scenes, found),
        "with_first_prompts": {
            "prompts": len(found[:NUM_FIRST]),
            **score(scenes[:NUM_FIRST], found[:NUM_FIRST]),
        },
        "prompt_emptied": score(scenes, emptied),
    }
    text = json.dumps(measures, indent=1, allow_nan=False)
    atomic_write_text(directory / MEASURES, text + "\n", root=directory)
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
        command = ["infer", "--from_file", str(listing)]
        command += ["--save_path", str(results), "--image_size", str(PICTURE_SIDE), str(PICTURE_SIDE)]
        command += [word for option, path in folder.files().items() for word in (f"--{option}", str(path))]
        done = run_command([*command, *FLAGS, *arguments], quiet=quiet)
        if done.returncode != 0:
            raise RunError(
                "`hyimg infer` failed", hint=done.stderr.strip() if quiet else "its message stands above"
            )
        paths = sorted(results.glob("*.png"))
        assert len(paths) == len(prompts)
        return [_picture(path) for path in paths]


def _picture(path: Path) -> Image.Image:
    with opened_image(path) as image:
        return image.convert("RGB")


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
