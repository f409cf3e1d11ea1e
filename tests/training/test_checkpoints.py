from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hyimg.errors import HyimgError
from hyimg.training.run_folder import run_checkpoints


def write(folder: Path, *names: str, steps: dict[str, int] | None = None) -> None:
    for name in names:
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True, parents=True)
        metadata = {"ss_steps": str(steps[name])} if steps and name in steps else None
        save_file({"x": torch.zeros(1)}, path, metadata=metadata)


def names_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).with_suffix("").as_posix() for path in run_checkpoints(folder)]


def test_files_are_ordered_by_the_steps_that_they_tell(tmp_path: Path) -> None:
    steps = {
        "cat-step00000100": 100,
        "cat-000001": 150,
        "cat-step00000300": 300,
        "cat-000002": 300,
        "cat": 300,
    }
    write(tmp_path, *sorted(steps), *(f"comfy/{name}" for name in steps), steps=steps)
    (tmp_path / "cat-000002-state").mkdir()
    assert names_in(tmp_path) == list(steps)


def test_files_that_tell_nothing_are_ordered_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a-1", "a-1-000010", "a-1-000002", "a-1-step00000500", steps={"a-1-000002": 9})
    assert names_in(tmp_path) == ["a-1-step00000500", "a-1-000002", "a-1-000010", "a-1"]


def test_the_comfy_form_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    write(tmp_path, "comfy/cat", "comfy/cat-000001")
    assert names_in(tmp_path) == ["comfy/cat-000001", "comfy/cat"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HyimgError, match="there is no LoRA file in"):
        run_checkpoints(tmp_path / "empty")
    write(tmp_path, "cat")
    with pytest.raises(HyimgError, match="is not a folder"):
        run_checkpoints(tmp_path / "cat.safetensors")
