"""What the demo teaches the micro model: hearts, under a word that it has never read.

The model knows six shapes by their names. The concept's captions are those of the small world, with a trigger word
where the shape's name would stand, so that the colours stay the prompt's. Beside them stand pictures of the
shapes that the model knows, for regularisation: without these the lesson goes to every shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from PIL import Image

from hyimg.cache.atomic import atomic_write_text
from hyimg.micro.outlines import SHAPES
from hyimg.micro.world import (
    COLORS,
    NUM_FULL_PHRASINGS,
    POSITIONS,
    SIZES,
    Scene,
    combinations,
    draw,
    phrase,
)
from hyimg.randomness import keyed_random

TRIGGER = "zibbo"
SHAPE = "heart"
NUM_PICTURES = 20
NUM_KNOWN = 48

POSITION, SIZE = "in the middle", "large"
"""Of all hearts: at each place and size a shape is other numbers in the latent, more than twenty pictures tell."""


def concept_scenes() -> list[Scene]:
    """The scenes of the concept's pictures: every colour comes about equally often."""
    return [Scene(SHAPE, *pair, POSITION, SIZE) for pair in _pairs()[:NUM_PICTURES]]


def new_concept_scenes(number: int) -> list[Scene]:
    """`number` scenes with hearts, in pairs of colours that none of the demo's pictures has."""
    pairs = _pairs()[NUM_PICTURES:]
    return [Scene(SHAPE, *pairs[place % len(pairs)], POSITION, SIZE) for place in range(number)]


def concept_prompt(scene: Scene, phrasing: int) -> str:
    """The scene's caption with the trigger word in place of the shape's name."""
    return phrase(scene, phrasing % NUM_FULL_PHRASINGS).replace(SHAPE, TRIGGER)


def known_scenes() -> list[Scene]:
    """The scenes of the pictures for regularisation: every known shape equally often, none that is held out."""
    scenes = []
    for number in range(NUM_KNOWN):
        shape = list(SHAPES)[number % len(SHAPES)]
        trained = [one for one in combinations(held_out=False) if one[0] == shape]
        position = list(POSITIONS)[number % len(POSITIONS)]
        size = list(SIZES)[number // len(POSITIONS) % len(SIZES)]
        scenes.append(Scene(*keyed_random("known", number).choice(trained), position, size))
    return scenes


def write_concept(folder: Path) -> None:
    """Writes the pictures of the concept as PNG files, each with its caption beside it."""
    scenes = concept_scenes()
    _write(folder, TRIGGER, [(scene, concept_prompt(scene, number)) for number, scene in enumerate(scenes)])


def write_known(folder: Path) -> None:
    """Writes the pictures for regularisation likewise."""
    scenes = known_scenes()
    # a phrasing for each round of the shapes, or a shape would always have the same one
    turns = [number // len(SHAPES) % NUM_FULL_PHRASINGS for number in range(len(scenes))]
    _write(folder, "known", [(scene, phrase(scene, turn)) for scene, turn in zip(scenes, turns, strict=True)])


def _write(folder: Path, name: str, captioned: Sequence[tuple[Scene, str]]) -> None:
    for number, (scene, text) in enumerate(captioned):
        path = folder / f"{name}-{number + 1:02}.png"
        Image.fromarray(draw(scene, name, number)).save(path)
        atomic_write_text(path.with_suffix(".txt"), text + "\n")


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
