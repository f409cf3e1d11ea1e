from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from hyimg.checkpoints.architecture import DiTArch
from hyimg.model.dit import DiT, TextCondition

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden_tensors() -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def under() -> Callable[[Mapping[str, Tensor], str], dict[str, Tensor]]:
    return below


@pytest.fixture(scope="session")
def make_dit() -> Callable[[Mapping[str, Tensor]], DiT]:
    """A DiT whose sizes are read from `weights.*` of a golden file and whose weights are those."""

    def make(tensors: Mapping[str, Tensor]) -> DiT:
        weights = below(tensors, "weights.")
        model = DiT(DiTArch.from_shapes({name: tuple(w.shape) for name, w in weights.items()}))
        model.load_state_dict(weights)
        return model

    return make


@pytest.fixture(scope="session")
def make_text() -> Callable[[Mapping[str, Tensor], str], TextCondition]:
    """The text of a golden case, whose padding holds garbage on purpose."""

    def make(tensors: Mapping[str, Tensor], case: str) -> TextCondition:
        return TextCondition(
            tensors[f"{case}.text_states"].clone(),
            tensors[f"{case}.text_mask"].bool(),
            tensors[f"{case}.byt5_states"].clone(),
            tensors[f"{case}.byt5_mask"].bool(),
        )

    return make
