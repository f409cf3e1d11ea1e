"""The demo's concept, folder and model: hearts, under a word that the micro model has never read.

The model knows six shapes by their names. The concept's captions are those of the small world, with a trigger word in
place of the shape's name, so that the prompt keeps control of colours. Regularisation images show the shapes that the
model knows; without them the LoRA changes every shape.

The model's folder has the four files and the tokenizer as `python -m benchmarks.micro build` made them, the build's
manifest, recipe and logs, and the results of `measure` and `prove`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image

from hyimg.cache.atomic import atomic_path, atomic_write_text
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.demo.world import (
    COLORS,
    NUM_FULL_PHRASINGS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    combinations,
    draw,
    phrase,
)
from hyimg.errors import HyimgError
from hyimg.randomness import keyed_random
from hyimg.rendering.decoding import save_png

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
    """Writes the pictures of the concept as PNG files, each with its caption next to it."""
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
        save_png(Image.fromarray(draw(scene, name, number)), path, None, root=folder)
        atomic_write_text(path.with_suffix(".txt"), text + "\n", root=folder)


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


NAME = "demo"
NUM_EPOCHS = 60
HALF_WAY = 30


@dataclass(frozen=True)
class DemoFolder:
    """The files of a demo."""

    directory: Path

    @property
    def marker(self) -> Path:
        """Says that the folder is a demo's and may be replaced."""
        return self.directory / "hyimg-demo.txt"

    @property
    def model(self) -> ModelFolder:
        return ModelFolder(self.directory / "model")

    @property
    def images(self) -> Path:
        return self.directory / "images"

    @property
    def known(self) -> Path:
        """Pictures for regularisation."""
        return self.directory / "known"

    @property
    def dataset(self) -> Path:
        return self.directory / "dataset.toml"

    @property
    def crops(self) -> Path:
        """The contact sheet of `hyimg dataset`."""
        return self.directory / "dataset.png"

    @property
    def prompts(self) -> Path:
        return self.directory / "prompts.txt"

    @property
    def cache(self) -> Path:
        return self.directory / "hyimg-cache"

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def half_way(self) -> Path:
        """The LoRA of the epoch in the middle."""
        return self.run / f"{NAME}-{HALF_WAY:06}.safetensors"

    @property
    def lora(self) -> Path:
        return self.run / f"{NAME}.safetensors"

    @property
    def metrics(self) -> Path:
        return self.run / f"{NAME}.metrics.jsonl"

    @property
    def comfy_lora(self) -> Path:
        return self.directory / f"{NAME}-comfy.safetensors"

    @property
    def sample(self) -> Path:
        return self.directory / "sample"

    @property
    def sheet(self) -> Path:
        """Before and after."""
        return self.sample / "sheet.png"

    @property
    def picture(self) -> Path:
        """What `hyimg infer` renders."""
        return self.directory / "render" / f"{TRIGGER}.png"

    def contents(self) -> list[Path]:
        """The files and folders that a demo leaves in the folder, but for the marker."""
        names = "images known dataset crops prompts cache run comfy_lora sample".split()
        return [self.model.directory, self.picture.parent, *(getattr(self, name) for name in names)]

    def places(self) -> dict[str, Path]:
        """The names that stand in the demo's command lines."""
        names = "dataset crops prompts cache run half_way lora comfy_lora sample picture".split()
        return {**self.model.files(), **{name: getattr(self, name) for name in names}}


WEIGHTS = Path(__file__).parent / "weights"


def check_micro_model() -> None:
    """Raises HyimgError where the installation lacks a file of the model."""
    shipped = ModelFolder(WEIGHTS)
    for path in (*shipped.files().values(), shipped.tokenizer):
        if not path.is_file():
            raise HyimgError(
                f"this installation of hyimg has no micro model: `{path}` is missing", hint="install it again"
            )


def copy_micro_model(target: ModelFolder, *, root: Path | None = None) -> None:
    """Copies the shipped model's files; the folder is made where it is not there. `root` as for `atomic_path`."""
    shipped = ModelFolder(WEIGHTS)
    for path in (*shipped.files().values(), shipped.tokenizer):
        with atomic_path(target.directory / path.name, root=root or target.directory) as temporary:
            shutil.copyfile(path, temporary)
