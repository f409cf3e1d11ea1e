"""The plugin's two functions, without hyimg around them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location(
    "hyimg_frequency", Path(__file__).parents[1] / "hyimg_frequency.py"
)
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)


def test_gain_one_is_the_mean_squared_error():
    prediction, target = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    expected = (prediction - target).square().flatten(1).mean(1)
    torch.testing.assert_close(plugin.frequency(prediction, target, None, gain=1.0), expected)


def test_detail_costs_more_than_a_flat_error_of_the_same_size():
    target = torch.zeros(2, 1, 8, 8)
    flat, checkers = torch.ones(8, 8), torch.ones(8, 8)
    checkers[::2, ::2] = checkers[1::2, 1::2] = -1
    loss_B = plugin.frequency(torch.stack([flat, checkers])[:, None], target, None, gain=3.0)
    assert loss_B[0].item() == pytest.approx(1.0)
    assert loss_B[1].item() == pytest.approx(3.0)


def test_midpoint_converges_with_at_least_the_second_order():
    # a Gaussian of deviation 2: the exact path is known, x(sigma) grows as sqrt(sigma^2 + 4 (1 - sigma)^2)
    def denoise(x, sigma):
        variance = sigma**2 + 4 * (1 - sigma) ** 2
        velocity = x * (sigma - 4 * (1 - sigma)) / variance
        return x - sigma * velocity

    def error(steps):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return abs(plugin.midpoint(denoise, torch.ones(1, dtype=torch.float64), sigmas, None).item() - 2)

    # Euler's ratio is 1; on this smooth path midpoint even reaches 3
    assert math.log2(error(20) / error(40)) > 1.8
