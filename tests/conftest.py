"""What every test needs: golden files, a tiny model made once, and no plugins of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"

# tests run side by side, on models too small for threads to help
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL's kernels differ by an ulp from one processor to another; with these the golden files agree to 1e-6
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
# installed packages must not change what a test sees; the plugin tests ask for them by name
os.environ["HYIMG_LOAD_PLUGINS"] = ""
# a machine with a hub and one without must act alike
os.environ["HF_HUB_OFFLINE"] = "1"
# nobody here has an account
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; its READMEs say where each comes from."""
    return GOLDEN


@pytest.fixture(scope="session")
def rename() -> Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]:
    """Tensors under original names to those of another layout: the way back of a key map of `hyimg.model.keys`.

    Takes the tensors, the key map of the other layout's names, and tensors of its shapes.
    """

    def renamed(
        tensors: Mapping[str, Any], key_map: Mapping[str, Any], like: Mapping[str, Any]
    ) -> dict[str, Any]:
        import torch

        other = {}
        for name, source in key_map.items():
            tensor = tensors[name]
            if source.swap_halves:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            parts = tensor.split([len(like[part]) for part in source.parts])
            other.update(zip(source.parts, (part.clone() for part in parts), strict=True))
        return other

    return renamed
