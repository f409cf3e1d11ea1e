"""What a picture of the small world shows, found without learning: colours by their nearest, shapes by overlap.

A picture is judged as it is: noise, blur and the damage of compression are smoothed away first, and where nothing
fits, None is the answer.

Shapes: H W pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from hyimg.micro.letters import LETTERS
from hyimg.micro.outlines import NEW_SHAPES, SHAPES, draw_shape, unit_area, unit_centroid
from hyimg.micro.world import (
    COLORS,
    LETTER_CELL,
    PICTURE_SIDE,
    POSITIONS,
    SIZES,
    STEP,
    Scene,
    letter_layer,
)

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
