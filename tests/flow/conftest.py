"""Golden files and small helpers of the flow tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def schedule() -> dict[str, Any]:
    """tests/golden/schedule.json."""
    golden: dict[str, Any] = json.loads((GOLDEN / "schedule.json").read_text())
    return golden


@pytest.fixture(scope="session")
def golden_tensors() -> Callable[[str], dict[str, torch.Tensor]]:
    """Loads a golden safetensors file by its name."""
    return lambda name: load_file(GOLDEN / name)


@pytest.fixture(scope="session")
def golden_prompts() -> dict[str, Any]:
    """tests/golden/prompts.json."""
    golden: dict[str, Any] = json.loads((GOLDEN / "prompts.json").read_text())
    return golden
