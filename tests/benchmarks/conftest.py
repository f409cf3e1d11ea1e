from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The benchmarks are no part of the package: they are run from the repository's root, as `make bench` does
sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
