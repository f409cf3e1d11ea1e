"""A micro model of a few steps: everything is in it but the knowledge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hyimg.micro.build import build
from hyimg.micro.recipe import Recipe
from hyimg.model.folder import ModelFolder
from hyimg.report import SilentReporter

_USUAL = Recipe()
SHORT = replace(
    _USUAL,
    vae=replace(_USUAL.vae, steps=4, batch_size=1, warmup_steps=1),
    dit=replace(_USUAL.dit, steps=4, batch_size=4, warmup_steps=1),
    vae_start_pictures=2,
    num_pictures=6,
)


@pytest.fixture(scope="session")
def short() -> Recipe:
    return SHORT


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> ModelFolder:
    """Built of four steps each. Read only."""
    return build(tmp_path_factory.mktemp("micro") / "model", SHORT, SilentReporter())
