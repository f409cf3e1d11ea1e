"""The adapter by itself: its formula, its start, and what a network relies on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hyimg.randomness import keyed_generator

spec = importlib.util.spec_from_file_location("hyimg_vera", Path(__file__).parents[1] / "hyimg_vera.py")
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)

OUT, IN, RANK = 12, 10, 4


@pytest.fixture
def vera():
    adapter = plugin.VeRA(IN, OUT, rank=RANK, alpha=2.0)
    adapter.initialize(1, "a module")
    return adapter


def test_a_fresh_adapter_does_nothing_and_can_learn(vera):
    assert not bool(vera.delta().any())
    vera.delta().sum().backward()
    assert bool(vera.vera_lambda_b.grad.any())


def test_the_update_is_the_papers_with_matrices_that_depend_on_the_shape_alone(vera):
    for name, parameter in vera.named_parameters():
        parameter.data.normal_(generator=keyed_generator(name))
    b, d = torch.diag(vera.vera_lambda_b), torch.diag(vera.vera_lambda_d)
    torch.testing.assert_close(vera.delta(), 2.0 / RANK * b @ vera.b_OR @ d @ vera.a_RI)
    again = plugin.VeRA(IN, OUT, rank=RANK, alpha=2.0)
    again.load_tensors(vera.tensors())
    assert vera.tensors().keys() == {"vera_lambda_b", "vera_lambda_d", "alpha"}
    assert torch.equal(again.delta(), vera.delta())


def test_the_norm_is_the_updates_and_shrinking_scales_it(vera):
    vera.vera_lambda_b.data.normal_(generator=keyed_generator("b"))
    before = vera.delta().detach()
    torch.testing.assert_close(vera.update_norm(), torch.linalg.matrix_norm(before))
    vera.shrink(0.3)
    torch.testing.assert_close(vera.delta(), 0.3 * before)
