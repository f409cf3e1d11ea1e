"""Where `hyimg demo` puts things in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.micro.concept import TRIGGER
from hyimg.model.folder import ModelFolder

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

    def places(self) -> dict[str, Path]:
        """The names that stand in the demo's command lines."""
        names = "dataset crops prompts cache run half_way lora comfy_lora sample picture".split()
        return {**self.model.files(), **{name: getattr(self, name) for name in names}}
