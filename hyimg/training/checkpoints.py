"""The LoRA files that a run has left, in the order of training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from hyimg.errors import HyimgError
from hyimg.model.safetensors_file import read_header
from hyimg.training.run_folder import COMFY_FOLDER

_NAME = re.compile(r"(.+?)(?:-(step\d{8}|\d{6}))?\.safetensors")


class _Place(NamedTuple):
    """Where a file stands in training. `kind`: saved by step, by epoch, at the end; `number`: step or epoch."""

    run: str
    steps_done: int
    kind: int
    number: int


def run_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint of a run folder once: by steps done, and at equal ones step, epoch, final file.

    ComfyUI's twins under `comfy/` are taken only where there is nothing else (`--save_format comfy`). Where a file does
    not tell its steps (`--no_metadata`), files saved by step come first, then those by epoch, then the final one.
    Raises HyimgError for what is no folder or holds no LoRA file.
    """
    if not folder.is_dir():
        raise HyimgError(f"`{folder}` is not a folder", hint="name the `--output_dir` of a training")
    files = sorted(folder.glob("*.safetensors")) or sorted((folder / COMFY_FOLDER).glob("*.safetensors"))
    if not files:
        raise HyimgError(f"there is no LoRA file in `{folder}`", hint="name the `--output_dir` of a training")
    places = {path: _place(path) for path in files}
    if any(place.steps_done < 0 for place in places.values()):
        places = {path: place._replace(steps_done=0) for path, place in places.items()}
    return sorted(files, key=lambda path: places[path])


def _place(path: Path) -> _Place:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    run, number = found[1], found[2] or ""
    kind = 0 if number.startswith("step") else 1 if number else 2
    steps = read_header(path).metadata.get("ss_steps", "")
    return _Place(run, int(steps) if steps.isdecimal() else -1, kind, int(number.removeprefix("step") or 0))
