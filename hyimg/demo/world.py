"""The small world of the micro model: one plain shape on a plain background, and at times a letter in the corner.

Scenes, pictures and captions are functions of keys. Every eighth combination of shape, colour and background is
held out: no training scene has one, and every prompt that the model is measured by has.

Shapes: H W pixels, R G B the three levels of a colour

The letters of the small world: a bitmap font of its own, since fonts differ from machine to machine.

Shapes: H W pixels

The shapes of the small world as formulas, drawn with soft edges: the same pixels on every machine.

Coordinates have the shape's middle at 0, its radius as 1, and point right and down.
Shapes: H W pixels, h w points (`_FINE` to a pixel a side)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice, product

import numpy as np
import numpy.typing as npt

from hyimg.randomness import keyed_random, keyed_seed

# Five columns, seven rows
_GLYPHS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "J": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
}
LETTERS = tuple(_GLYPHS)

PIXEL = 4
"""Pixels of the picture to a pixel of the font."""


def letter_mask(letter: str) -> npt.NDArray[np.float64]:
    """The letter as drawn, (28, 20): 1 where it covers, else 0."""
    rows = [[float(dot == "#") for dot in row] for row in _GLYPHS[letter].split()]
    return np.kron(np.array(rows), np.ones((PIXEL, PIXEL)))


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


PICTURE_SIDE = 128

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (214, 38, 42),
    "orange": (245, 142, 30),
    "yellow": (244, 224, 58),
    "green": (38, 152, 62),
    "blue": (36, 76, 214),
    "purple": (146, 48, 178),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
_LIGHT = ("orange", "yellow", "white")
"""Backgrounds on which letters are black; on the others they are white."""

POSITIONS: dict[str, tuple[int, int]] = {
    "in the middle": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
"""Steps from the middle, to the right and down."""
STEP = 26
"""Pixels of a step."""

SIZES: dict[str, float] = {"small": 20.0, "large": 27.0}
"""Radii in pixels."""

LETTER_CELL = 96
"""Where the corner of letters begins, right and down: one latent pixel of the 16, which no shape reaches."""

# How much a picture may depart from its plain scene: pixels, a share of the radius, levels of a colour
_SHIFT, _GROWTH, _SHADE = 3, 0.08, 6

_LETTER_SHARE = 0.3
_HELD_OUT_SHARE = 8

_PHRASINGS = (
    "a {size} {color} {shape} {position}, {background} background",
    "{background} background with a {size} {color} {shape} {position}",
    "one {color} {shape}, {size}, {position}, the background is {background}",
    "one {color} {shape} on {background}",
)
NUM_FULL_PHRASINGS = len(_PHRASINGS) - 1
"""Phrasings that say all of a scene; the one more leaves size and position out."""
_LETTER_PHRASES = (', with the letter "{letter}"', ' and the text "{letter}"')


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `letter` is None where none is drawn."""

    shape: str
    color: str
    background: str
    position: str
    size: str
    letter: str | None = None


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Whether the model is never shown this combination."""
    return keyed_seed("held out", shape, color, background) % _HELD_OUT_SHARE == 0


@cache
def combinations(*, held_out: bool) -> tuple[tuple[str, str, str], ...]:
    """Shape, colour and background of all scenes that are trained, or of all that are not."""
    pairs = [(color, background) for color, background in product(COLORS, COLORS) if color != background]
    everything = ((shape, *pair) for shape in SHAPES for pair in pairs)
    return tuple(one for one in everything if is_held_out(*one) == held_out)


def training_scene(seed: int, number: int) -> Scene:
    """The scene of a number; every trained combination, position and size is equally frequent."""
    return _scene(combinations(held_out=False), ("scene", seed, number))


def held_out_scenes(number: int, *, seed: int = 0) -> list[Scene]:
    """So many different scenes whose combinations the model was never shown."""
    choices = combinations(held_out=True)
    scenes = (_scene(choices, ("held-out scene", seed, place)) for place in count())
    return list(islice(dict.fromkeys(islice(scenes, 20 * number)), number))


def _scene(choices: Sequence[tuple[str, str, str]], key: tuple[object, ...]) -> Scene:
    random = keyed_random(*key)
    shape, color, background = random.choice(choices)
    position, size = random.choice(list(POSITIONS)), random.choice(list(SIZES))
    letter = random.choice(LETTERS) if random.random() < _LETTER_SHARE else None
    return Scene(shape, color, background, position, size, letter)


def caption(scene: Scene, *key: object) -> str:
    """A caption of the scene, its phrasing drawn by key; the last of the phrasings leaves size and position out."""
    random = keyed_random("caption", *key)
    return phrase(scene, random.randrange(len(_PHRASINGS)), random.randrange(len(_LETTER_PHRASES)))


def phrase(scene: Scene, phrasing: int, letter_phrase: int = 0) -> str:
    """The scene in the words of one phrasing, from 0."""
    text = _PHRASINGS[phrasing].format_map(vars(scene))
    return text if scene.letter is None else text + _LETTER_PHRASES[letter_phrase].format_map(vars(scene))


def draw(scene: Scene, *key: object) -> npt.NDArray[np.uint8]:
    """The picture of a scene, (128, 128, 3); place, size and shades vary a little by key.

    Without a key it is the scene as plainly as it can be. `scene.shape` may be one that no training scene has.
    """
    random = keyed_random("picture", *key)
    spread = 1.0 if key else 0.0

    def vary(most: float) -> float:
        return spread * random.uniform(-most, most)

    across, down = POSITIONS[scene.position]
    middle = PICTURE_SIDE / 2
    center = (middle + across * STEP + vary(_SHIFT), middle + down * STEP + vary(_SHIFT))
    coverage_HW = draw_shape(scene.shape, center, SIZES[scene.size] * (1 + vary(_GROWTH)), PICTURE_SIDE)
    shades = [[level + vary(_SHADE) for level in COLORS[name]] for name in (scene.background, scene.color)]
    image_HWC = _mixed(np.array(shades[0]), np.array(shades[1]), coverage_HW)
    if scene.letter is not None:
        image_HWC = _mixed(
            image_HWC, np.array(COLORS[letter_color(scene.background)]), letter_layer(scene.letter)
        )
    return np.clip(np.rint(image_HWC), 0, 255).astype(np.uint8)


def letter_color(background: str) -> str:
    """The colour in which letters stand on a background."""
    return "black" if background in _LIGHT else "white"


def letter_layer(letter: str) -> npt.NDArray[np.float64]:
    """Where a letter covers the picture, (128, 128), 0 or 1."""
    layer_HW = np.zeros((PICTURE_SIDE, PICTURE_SIDE))
    mask_HW = letter_mask(letter)
    room = PICTURE_SIDE - LETTER_CELL
    top, left = (LETTER_CELL + (room - length) // 2 for length in mask_HW.shape)
    layer_HW[top : top + mask_HW.shape[0], left : left + mask_HW.shape[1]] = mask_HW
    return layer_HW


def _mixed(
    below: npt.NDArray[np.float64], above: npt.NDArray[np.float64], coverage_HW: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    share_HW1 = coverage_HW[..., None]
    mixed: npt.NDArray[np.float64] = below * (1 - share_HW1) + above * share_HW1
    return mixed
