"""What the demo teaches the micro model: hearts, under a word that it has never read.

The model knows six shapes by their names. The concept's captions are those of the small world, with a trigger word
where the shape's name would stand, so that colour, place and size stay the prompt's.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from PIL import Image

from hyimg.cache.atomic import atomic_write_text
from hyimg.micro.world import COLORS, NUM_FULL_PHRASINGS, POSITIONS, SIZES, Scene, draw, phrase
from hyimg.randomness import keyed_random

TRIGGER = "zibbo"
SHAPE = "heart"
NUM_PICTURES = 20


def concept_scenes() -> list[Scene]:
    """The scenes of the demo's pictures: every colour, place and size comes about equally often."""
    return _scenes(list(_pairs())[:NUM_PICTURES])


def new_concept_scenes(number: int) -> list[Scene]:
    """`number` scenes with hearts, in pairs of colours that none of the demo's pictures has."""
    pairs = list(_pairs())[NUM_PICTURES:]
    return _scenes([pairs[place % len(pairs)] for place in range(number)], start=NUM_PICTURES)


def concept_prompt(scene: Scene, phrasing: int) -> str:
    """The scene's caption with the trigger word in place of the shape's name."""
    return phrase(scene, phrasing % NUM_FULL_PHRASINGS).replace(SHAPE, TRIGGER)


def write_concept(folder: Path) -> None:
    """Writes the demo's pictures as PNG files, each with its caption beside it."""
    for number, scene in enumerate(concept_scenes()):
        name = f"{TRIGGER}-{number + 1:02}"
        Image.fromarray(draw(scene, "concept", number)).save(folder / f"{name}.png")
        atomic_write_text(folder / f"{name}.txt", concept_prompt(scene, number) + "\n")


def _pairs() -> list[tuple[str, str]]:
    """Colours of a shape and its background, in an order in which no colour is far behind another.

    In a round every colour is the shape's once, on the background that is so many further in a shuffled list.
    """
    names = list(COLORS)
    keyed_random("concept").shuffle(names)
    rounds = (1, 3, 5, 7, 2, 4, 6)  # of those that a demo trains on, each colour is left as a background too
    return [
        (names[place], names[(place + step) % len(names)])
        for step, place in product(rounds, range(len(names)))
    ]


def _scenes(pairs: list[tuple[str, str]], *, start: int = 0) -> list[Scene]:
    positions, sizes = list(POSITIONS), list(SIZES)
    return [
        Scene(
            SHAPE,
            color,
            background,
            positions[number % len(positions)],
            sizes[number // len(positions) % len(sizes)],
        )
        for number, (color, background) in enumerate(pairs, start)
    ]
