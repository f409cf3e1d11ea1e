"""Shared by the tests of the data room: small datasets on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.dataset_keys import DatasetFile


def _settle(path: Path) -> None:
    past = time.time_ns() - 60_000_000_123
    os.utime(path, ns=(past, past))


@pytest.fixture
def add_image() -> Callable[..., Path]:
    """Writes a picture of noise (so that no two are equal), dated back so that it may be remembered."""

    def add(
        path: Path,
        size: tuple[int, int] = (64, 64),
        caption: str | None = "a cat",
        seed: int = 0,
        mode: str = "RGB",
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (size[1], size[0], 3))
        Image.fromarray(noise.astype(np.uint8)).convert(mode).save(path)
        _settle(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return add


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., DatasetFile]:
    """Loads a dataset file of one dataset over `images/`, with the given dataset and subset lines."""

    def load(dataset_lines: str = "resolution = 64", subset_lines: str = "") -> DatasetFile:
        path = tmp_path / "set.toml"
        path.write_text(
            f"[[datasets]]\n{dataset_lines}\n[[datasets.subsets]]\nimage_dir = 'images'\n{subset_lines}\n",
            encoding="utf-8",
        )
        return load_dataset_file(path)

    return load
