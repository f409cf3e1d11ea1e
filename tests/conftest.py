"""What every test needs: golden files, a tiny model made once, and no plugins of the machine."""

from __future__ import annotations

import os
from pathlib import Path

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
