"""The shapes of the small world as formulas, drawn with soft edges: the same pixels on every machine.

Coordinates have the shape's middle at 0, its radius as 1, and point right and down.
Shapes: H W pixels, h w points (`_FINE` to a pixel a side)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Inside = Callable[[Points, Points], npt.NDArray[np.bool_]]

# Points to a pixel along each side, of which its coverage is the mean
_FINE = 4


def _circle(x: Points, y: Points) -> npt.NDArray[np.bool_]:
    return x**2 + y**2 <= 1


def _square(x: Points, y: Points) -> npt.NDArray[np.bool_]:
    return np.maximum(abs(x), abs(y)) <= 0.86


def _triangle(x: Points, y: Points) -> npt.NDArray[np.bool_]:
    return (y <= 0.75) & (abs(x) <= 0.58 * (y + 1))


def _diamond(x: Points, y: Points) -> npt.NDArray[np.bool_]:
    return 1.5 * abs(x) + abs(y) <= 1.1


def _cross(x: Points, y: Points) -> npt.NDArray[np.bool_]:
    return (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1)


def _ring(x: Points, y: Points) -> npt.NDArray[np.bool_]:
    return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.55**2)


def _heart(x: Points, y: Points) -> npt.NDArray[np.bool_]:
    x, y = 1.2 * x, -1.2 * y
    inside: npt.NDArray[np.bool_] = (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0
    return inside


SHAPES: dict[str, Inside] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
"""What the micro model knows."""
NEW_SHAPES: dict[str, Inside] = {"heart": _heart}
"""What it is never shown, so that a LoRA can teach it."""


def draw_shape(name: str, center: tuple[float, float], radius: float, side: int) -> npt.NDArray[np.float64]:
    """How much of each pixel of a square picture a shape covers, (side, side), 0..1.

    `center` is the pixel coordinate (right, down) of the shape's middle, `radius` is in pixels.
    """
    inside = {**SHAPES, **NEW_SHAPES}[name]
    points = (np.arange(side * _FINE) + 0.5) / _FINE
    x_hw, y_hw = ((points - middle) / radius for middle in center)
    covered_hw = inside(x_hw[None, :], y_hw[:, None])
    coverage: npt.NDArray[np.float64] = covered_hw.reshape(side, _FINE, side, _FINE).mean((1, 3))
    return coverage


@cache
def unit_area(name: str) -> float:
    """The area of a shape of radius 1."""
    radius = 48.0
    return float(draw_shape(name, (64.0, 64.0), radius, 128).sum()) / radius**2


@cache
def unit_centroid(name: str) -> tuple[float, float]:
    """Where a shape's centroid lies from its middle, in radii (right, down)."""
    radius = 48.0
    coverage_HW = draw_shape(name, (64.0, 64.0), radius, 128)
    points = np.arange(128) + 0.5
    right = float((coverage_HW.sum(0) * points).sum() / coverage_HW.sum())
    down = float((coverage_HW.sum(1) * points).sum() / coverage_HW.sum())
    return (right - 64) / radius, (down - 64) / radius
