"""The letters of the small world: a bitmap font of its own, since fonts differ from machine to machine.

Shapes: H W pixels
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
