"""What is told of a step: losses smoothed and by band, speed, memory, time left."""

from __future__ import annotations

import json
import math
from pathlib import Path

import psutil
import pytest
import torch

from hyimg.training.metrics import (
    COST_FIELDS,
    SmoothedLosses,
    StepCost,
    band_name,
    live_text,
    peak_memory_bytes,
)


def test_losses_are_told_by_band_and_a_band_without_an_image_is_left_out():
    losses = SmoothedLosses()
    first = losses.add(torch.tensor([1.0, 2.0, 6.0]), [10.0, 240.0, 999.0], taken=True)
    assert first == {
        "loss": 3.0,
        "loss_smoothed": 3.0,
        "loss_t0-250": 1.5,
        "loss_smoothed_t0-250": 1.5,
        "loss_t750-1000": 6.0,
        "loss_smoothed_t750-1000": 6.0,
    }
    second = losses.add(torch.tensor([8.0]), [750.0], taken=True)
    assert second == {
        "loss": 8.0,
        "loss_smoothed": 5.5,
        "loss_t750-1000": 8.0,
        "loss_smoothed_t750-1000": 7.0,
    }


def test_the_bands_are_those_of_validation():
    losses = SmoothedLosses()
    told = losses.add(torch.ones(4), [0.0, 250.0, 500.0, 1000.0], taken=True)
    assert {f"loss_{band_name(band)}" for band in range(4)} <= told.keys()


def test_a_step_that_is_not_taken_is_told_and_moves_no_mean():
    losses = SmoothedLosses()
    losses.add(torch.tensor([2.0]), [100.0], taken=True)
    told = losses.add(torch.tensor([math.nan]), [100.0], taken=False)
    assert math.isnan(told["loss"])
    assert (told["loss_smoothed"], told["loss_smoothed_t0-250"]) == (2.0, 2.0)


def test_the_means_go_on_from_their_state_as_json_keeps_it():
    losses, again = SmoothedLosses(), SmoothedLosses()
    for step in range(60):  # more than a mean takes in
        losses.add(torch.tensor([0.1 * step, 0.3]), [step * 16.0, 600.0], taken=True)
    again.load_state_dict(json.loads(json.dumps(losses.state_dict())))
    following = (torch.tensor([0.7, 0.2, 0.9]), [3.0, 600.0, 900.0])
    assert again.add(*following, taken=True) == losses.add(*following, taken=True)


def test_the_time_left_is_what_the_steps_after_the_first_took_with_what_came_between(monkeypatch):
    now = iter([0.0, 60.0, 62.0, 66.0])  # compiled for a minute; a validation of two seconds
    monkeypatch.setattr("hyimg.report.time.monotonic", lambda: next(now))
    cost = StepCost(torch.device("cpu"), 10)
    told = [cost.of_step(4, 2.0) for _ in range(3)]
    assert [line["eta_seconds"] for line in told] == [540.0, 16.0, 21.0]
    assert tuple(told[0]) == COST_FIELDS
    assert told[0]["samples_per_second"] == 2.0


def test_peak_memory_is_at_least_what_the_process_holds_and_in_bytes():
    held = psutil.Process().memory_info().rss
    assert 0.99 * held <= peak_memory_bytes(torch.device("cpu")) < 50 * held


def test_the_live_line_tells_the_rate_that_the_optimiser_comes_to():
    values = {"loss_smoothed": 0.25, "learning_rate": 1.0, "effective_learning_rate": 2e-4}
    values |= {"gradient_norm": 0.5, "peak_memory_gb": 11.04}
    assert live_text(values, 2, 7) == "epoch 2/7, loss 0.2500, lr 2.00e-04, grad 0.5, peak 11.0 GB"


def test_every_field_is_in_the_docs(lines):
    docs = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    found = lines(max_train_steps=5, train_batch_size=2, scale_weight_norms=1.0, optimizer_type="Prodigy")
    found += lines(
        mixed_precision="fp16", blank_prompt_preservation=1.0, network_args=("loraplus_lr_ratio=2",)
    )
    fields = {key for line in found for key in line if not key.startswith("loss_smoothed_t")}
    assert {"loss_preservation", "loss_scale", "learning_rate_1", "effective_learning_rate"} <= fields
    assert [key for key in sorted(fields) if f"`{key}`" not in docs] == []


@pytest.fixture
def lines(train):
    def call(**options):
        run = train(**options)
        return [json.loads(line) for line in run.folder.metrics_path.read_text().splitlines()]

    return call


def test_every_line_of_a_run_has_its_fields_and_the_bands_of_its_images(lines):
    found = lines(max_train_steps=6, train_batch_size=2)
    for line in found:
        assert {"step", "epoch", "loss", "loss_smoothed", "gradient_norm", "learning_rate"} <= line.keys()
        assert set(COST_FIELDS) <= line.keys()
        bands = [key for key in line if key.startswith("loss_t")]
        assert 1 <= len(bands) <= 2, "two images"
        assert line["seconds"] > 0
        assert line["samples_per_second"] == pytest.approx(line["samples"] / line["seconds"], rel=1e-3)
        assert line["peak_memory_gb"] > 0.01
        if len(bands) == 1:
            assert line[bands[0]] == pytest.approx(line["loss"], rel=1e-6)
    assert [line["eta_seconds"] > 0 for line in found] == [True] * 5 + [False]
