"""The micro model that comes with the package. No torch.

Its folder has the four files and the tokenizer as `python -m hyimg.micro build` made them, the build's manifest, recipe
and logs, and what `measure` and `prove` found.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hyimg.errors import HyimgError
from hyimg.model.folder import ModelFolder

WEIGHTS = Path(__file__).parent / "weights"


def check_micro_model() -> None:
    """Raises HyimgError where the installation lacks a file of the model."""
    shipped = ModelFolder(WEIGHTS)
    for path in (*shipped.files().values(), shipped.tokenizer):
        if not path.is_file():
            raise HyimgError(
                f"this installation of hyimg has no micro model: `{path}` is missing", hint="install it again"
            )


def copy_micro_model(target: ModelFolder) -> None:
    """Copies the shipped model's files; the folder is made where it is not there."""
    target.directory.mkdir(parents=True, exist_ok=True)
    shipped = ModelFolder(WEIGHTS)
    for path in (*shipped.files().values(), shipped.tokenizer):
        shutil.copyfile(path, target.directory / path.name)
