"""A micro model of two steps: everything is in it but the knowledge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.micro.build import build
from benchmarks.micro.recipe import Recipe
from benchmarks.micro.vae import make_vae
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.model.vae import VAE
from hyimg.report import SilentReporter

_USUAL = Recipe()
SHORT = replace(
    _USUAL,
    vae=replace(_USUAL.vae, steps=2, batch_size=1, warmup_steps=1),
    dit=replace(_USUAL.dit, steps=2, batch_size=4, warmup_steps=1),
    vae_start_pictures=2,
    num_pictures=6,
)


@pytest.fixture(scope="session")
def short() -> Recipe:
    return SHORT


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> ModelFolder:
    """Built of two steps each. Read only."""
    return build(tmp_path_factory.mktemp("micro") / "model", SHORT, SilentReporter())


@pytest.fixture(scope="session")
def first_vae() -> Callable[[], VAE]:
    """Copies of the VAE that `SHORT` begins with, whose weights take seconds to compute."""
    vae = make_vae(SHORT)
    return lambda: copy.deepcopy(vae)
