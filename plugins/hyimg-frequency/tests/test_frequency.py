"""The loss, without hyimg around it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.flow.losses import LossContext

spec = importlib.util.spec_from_file_location(
    "hyimg_frequency", Path(__file__).parents[1] / "hyimg_frequency.py"
)
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)


def context(weight_map=None):
    return LossContext(torch.ones(2), torch.ones(2), weight_map)


def test_gain_one_is_the_mean_squared_error():
    prediction, target = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    expected = (prediction - target).square().flatten(1).mean(1)
    torch.testing.assert_close(plugin.frequency(prediction, target, context(), gain=1.0), expected)


def test_detail_costs_more_than_a_flat_error_of_the_same_size():
    target = torch.zeros(2, 1, 8, 8)
    flat, checkers = torch.ones(8, 8), torch.ones(8, 8)
    checkers[::2, ::2] = checkers[1::2, 1::2] = -1
    loss_B = plugin.frequency(torch.stack([flat, checkers])[:, None], target, context(), gain=3.0)
    assert loss_B[0].item() == pytest.approx(1.0)
    assert loss_B[1].item() == pytest.approx(3.0)


def test_a_mask_leaves_out_what_it_covers_and_the_mean_is_over_the_rest():
    error = torch.zeros(2, 1, 4, 4)
    error[:, :, :, :2] = 3.0
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :, :2] = 1
    mask[1, :, :, 2:] = 1
    loss_B = plugin.frequency(error, torch.zeros_like(error), context(mask), gain=1.0)
    assert loss_B.tolist() == pytest.approx([9.0, 0.0])


def test_a_negative_gain_is_refused():
    with pytest.raises(HyimgError, match="`gain`"):
        plugin.frequency(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), context(), gain=-1.0)
