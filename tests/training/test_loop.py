"""The step's arithmetic on one parameter, and what the loop leaves when it ends early."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hyimg.checkpoints.safetensors_file import read_header
from hyimg.config.training import NetworkTraining
from hyimg.distributed.processes import Processes
from hyimg.errors import RunError
from hyimg.report import SilentReporter
from hyimg.training.loop import train_step
from hyimg.training.stepping import NonFiniteGuard, Stepper
from hyimg.training.steps import Step


class OneParameter:
    """A run whose images are numbers: the loss of one is number * multiplier * parameter. SGD of rate 1."""

    def __init__(self, max_grad_norm=0.0, loss=None):
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.multiplier, self.keys = None, []
        self.loss = loss or (lambda numbers_B: numbers_B * self.multiplier * self.parameter)
        self.run = SimpleNamespace(
            network=SimpleNamespace(
                set_multiplier=lambda value: setattr(self, "multiplier", value),
                adapters=lambda: [(SimpleNamespace(name="it"), torch.nn.ParameterList([self.parameter]))],
                set_dropout_key=lambda *key, num_images=1: self.keys.append(key),
            ),
            objective=lambda batch, epoch: (
                self.loss(torch.tensor(batch.numbers)),
                torch.tensor(batch.numbers),
            ),
            stepper=Stepper(torch.optim.SGD([self.parameter], lr=1.0), max_grad_norm=max_grad_norm),
            guard=NonFiniteGuard(),
            last_good=None,
            report=SilentReporter(),
            config=SimpleNamespace(network_training=NetworkTraining()),
            seed=7,
            preservation=SimpleNamespace(losses=lambda batch, epoch: iter(self.preserved(batch)), terms=[]),
            processes=Processes(),
            device=torch.device("cpu"),
            loader=SimpleNamespace(keys=lambda numbers: [f"image {n:g}" for n in numbers]),
            ema=None,
        )

    def preserved(self, batch):
        """Losses beside the images' own, by default none."""
        return []

    def step(self, *batches, multipliers=None):
        """Takes a step; gives (losses, norm of the gradient, how far the parameter went down)."""
        before = self.parameter.item()
        multipliers = multipliers or [1.0] * len(batches)
        loaded = [
            SimpleNamespace(
                numbers=numbers, network_multiplier=multiplier, sample_keys=[f"image {n:g}" for n in numbers]
            )
            for numbers, multiplier in zip(batches, multipliers, strict=True)
        ]
        step = Step(1, batches)
        result = train_step(self.run, step, loaded, epoch=1)
        return result.loss_B.tolist(), result.gradient_norm, before - self.parameter.item()


def test_the_gradient_is_the_mean_over_the_steps_images_whatever_the_batches_sizes():
    assert OneParameter().step([1.0, 2.0], [6.0])[1:] == (3.0, 3.0)


def test_each_step_starts_from_no_gradient():
    run = OneParameter()
    run.step([1.0])
    losses, norm, moved = run.step([2.0], [4.0])
    assert losses == [-2.0, -4.0], "of the parameter after the first step, one for each image"
    assert (norm, moved) == (3.0, 3.0)


def test_each_batch_is_trained_at_its_datasets_multiplier():
    assert OneParameter().step([1.0, 2.0], [6.0], multipliers=[1.0, 0.5])[2] == 2.0


def test_each_batch_drops_by_the_key_of_its_place_in_the_step_and_nothing_is_dropped_after():
    run = OneParameter()
    run.step([1.0], [2.0])
    assert run.keys == [(7, 1, 0), (7, 1, 1), (None,)]


def test_what_is_preserved_adds_to_the_gradient_and_is_told_apart_from_the_loss():
    run = OneParameter()
    run.run.preservation.terms = ["one", "another"]
    run.preserved = lambda batch: [
        torch.full((len(batch.numbers),), 10.0) * (1 + run.parameter) for _ in range(2)
    ]
    losses, norm, _ = run.step([1.0, 2.0], [6.0])
    assert losses == [0.0, 0.0, 0.0]
    assert norm == pytest.approx(3.0 + 20.0)
    assert run.run.measured == {"loss_preservation": 20.0}


def test_a_batch_whose_adapters_are_all_left_out_adds_nothing():
    run = OneParameter(loss=lambda numbers_B: numbers_B)
    assert run.step([1.0])[1:] == (0.0, 0.0)


def test_the_gradient_is_clipped_by_its_norm_which_is_told_before():
    _, norm, moved = OneParameter(max_grad_norm=0.5).step([3000.0])
    assert norm == 3000.0
    assert moved == pytest.approx(0.5, rel=1e-6)  # torch divides by the norm plus 1e-6


def test_a_norm_of_zero_clips_nothing():
    assert OneParameter(max_grad_norm=0.0).step([3000.0])[2] == 3000.0


@pytest.mark.parametrize(
    "loss",
    [
        lambda parameter: parameter * math.nan,
        lambda parameter: parameter + math.inf,  # its gradient is 1
        lambda parameter: torch.sqrt(parameter * 0),  # it is 0, and its gradient is 0 * inf
    ],
    ids=["both", "loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run_before_the_optimiser_moves(loss):
    run = OneParameter(loss=lambda numbers_B: loss(run.parameter).expand(1))
    with pytest.raises(RunError, match="not finite"):
        run.step([1.0])
    assert run.parameter.item() == 0


def test_a_loss_that_breaks_leaves_the_files_before_it_whole_and_no_other(train, spy):
    calls = iter([1.0, 1.0, math.nan])
    spy.losses["breaks"] = lambda prediction, target, context: prediction.mean((1, 2, 3)) * next(calls)
    with pytest.raises(RunError, match="step 3"):
        train(loss_type="breaks", max_train_steps=4, save_every_n_steps=1)
    names = ["lora-step00000001.safetensors", "lora-step00000002.safetensors"]
    directory = spy.runs[0].folder.directory
    for folder in (directory, directory / "comfy"):
        assert sorted(path.name for path in folder.glob("*.safetensors")) == names
        state = load_file(folder / names[1])
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_an_epoch_that_is_not_complete_is_not_counted_and_not_saved(train):
    run = train(max_train_steps=5, save_every_n_epochs=1, save_format="kohya")  # an epoch is four batches
    saved = {path.name: read_header(path).metadata for path in run.folder.directory.glob("*.safetensors")}
    assert {name: (of["ss_epoch"], of["ss_steps"]) for name, of in saved.items()} == {
        "lora-000001.safetensors": ("1", "4"),
        "lora.safetensors": ("1", "5"),
    }


def test_each_epoch_is_loaded_and_drawn_as_itself(train, spy):
    loaded, drawn = [], []

    def listen(run):
        load, objective = run.loader.load, run.objective
        run.loader.load = lambda batches, *, epoch: loaded.append(epoch) or load(batches, epoch=epoch)
        run.objective = lambda batch, epoch: drawn.append(epoch) or objective(batch, epoch)

    spy.on_start = listen
    train(max_train_steps=6)
    assert (loaded, drawn) == ([1, 2], [1, 1, 1, 1, 2, 2])


def test_a_line_of_the_metrics_is_the_mean_over_the_steps_images(train, spy):
    values = iter([1.0, 2.0, 6.0, 7.0])
    spy.losses["counts"] = lambda prediction, target, context: 0 * prediction.mean((1, 2, 3)) + next(values)
    run = train(loss_type="counts", max_train_steps=2, gradient_accumulation_steps=3)
    lines = [json.loads(line) for line in run.folder.metrics_path.read_text().splitlines()]
    told = [(line["step"], line["epoch"], line["samples"], line["loss"]) for line in lines]
    assert told == [(1, 1, 3, 3.0), (2, 1, 1, 7.0)]
    assert [line["loss_smoothed"] for line in lines] == [3.0, 5.0]
