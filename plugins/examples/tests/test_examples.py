"""The files' functions by themselves; how they act in a run is tested through the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.flow.timesteps import Draws


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kumaraswamys_levels_are_as_often_as_its_distribution_says():
    uniform_B = (torch.arange(10_000) + 0.5) / 10_000
    sigma_B = load("kumaraswamy").kumaraswamy(Draws(uniform_B, uniform_B), None, a=2.0, b=3.0)
    for level in (0.2, 0.5, 0.9):
        assert (sigma_B <= level).float().mean().item() == pytest.approx(1 - (1 - level**2) ** 3, abs=1e-3)
    with pytest.raises(HyimgError, match="above 0"):
        load("kumaraswamy").kumaraswamy(Draws(uniform_B, uniform_B), None, a=0.0)


def test_signum_steps_by_the_sign_of_the_momentum():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 2.0]))
    optimizer = load("signum").Signum([weight], lr=0.1, momentum=0.75, weight_decay=0.5)
    for gradient in ([1.0, -4.0, 0.0], [-2.0, 1.0, 0.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    # averages [0.25, -1, 0], then [-0.3125, -0.5, 0]; each step also shrinks by 5%
    expected = [(0.95 - 0.1) * 0.95 + 0.1, (0.95 + 0.1) * 0.95 + 0.1, 2 * 0.95**2]
    assert weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("is_main", [True, False])
def test_of_several_processes_one_writes_the_diary(tmp_path, is_main):
    run = SimpleNamespace(
        folder=SimpleNamespace(directory=tmp_path, name="cat"),
        processes=SimpleNamespace(is_main=is_main),
        register_state=lambda part: None,
        measured={},
        step=1,
    )
    diary = load("diary")
    diary.hyimg_run_start(run)
    diary.hyimg_step_end(run, step=1, loss_B=torch.tensor([1.0, 3.0]))
    diary.hyimg_run_end(run)
    assert (tmp_path / "cat.diary.txt").exists() is is_main
