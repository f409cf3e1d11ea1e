"""The sampler, without hyimg around it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from hyimg.errors import HyimgError

spec = importlib.util.spec_from_file_location(
    "hyimg_midpoint", Path(__file__).parents[1] / "hyimg_midpoint.py"
)
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)


def gaussian(x, sigma):
    """The estimate for data of deviation 2, whose exact path grows as sqrt(sigma^2 + 4 (1 - sigma)^2)."""
    variance = sigma**2 + 4 * (1 - sigma) ** 2
    return x - sigma * x * (sigma - 4 * (1 - sigma)) / variance


def sample(steps, **arguments):
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return plugin.midpoint(gaussian, torch.ones(1, dtype=torch.float64), sigmas, None, **arguments).item()


@pytest.mark.parametrize("position", [0.5, 2 / 3])
def test_it_converges_with_at_least_the_second_order(position):
    errors = [abs(sample(steps, position=position) - 2) for steps in (20, 40)]
    # Euler's ratio is 1; on this smooth path the midpoint method even reaches 3
    assert math.log2(errors[0] / errors[1]) > 1.8


def test_each_step_is_told_with_the_estimate_at_its_start():
    told = []
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    plugin.midpoint(lambda x, sigma: x * 0, torch.ones(1), sigmas, lambda *step: told.append(step))
    assert [step for step, _, _ in told] == [0, 1]
    assert told[1][1].item() == pytest.approx(0.0)


@pytest.mark.parametrize("position", [0.0, 1.0, -0.5])
def test_a_position_at_an_end_is_refused(position):
    with pytest.raises(HyimgError, match="`position`"):
        sample(4, position=position)
