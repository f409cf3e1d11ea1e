"""`--initial_step`, `--initial_epoch` and `--save_n_epoch_ratio`: what follows from a run's length."""

from __future__ import annotations

import json

import pytest

from hyimg.errors import HyimgError
from hyimg.training.metrics import COST_FIELDS

# so small that no weight's change shows in a loss: then steps can be compared whatever came before them
STILL = {"learning_rate": 1e-30, "lr_scheduler": "linear", "lr_warmup_steps": 3}


def lines(run):
    text = run.folder.metrics_path.read_text()
    smoothed = {key for key in json.loads(text.splitlines()[-1]) if "smoothed" in key}
    left_out = {*COST_FIELDS, *smoothed}
    return [
        {k: v for k, v in json.loads(line).items() if k not in left_out and "smoothed" not in k}
        for line in text.splitlines()
    ]


@pytest.fixture
def whole(train):
    return train(max_train_steps=10, **STILL)  # an epoch is four steps


@pytest.mark.parametrize(("option", "first"), [({"initial_step": 5}, 6), ({"initial_epoch": 3}, 9)])
def test_a_run_that_begins_later_goes_as_the_whole_one_from_there(train, whole, option, first):
    later = train(max_train_steps=10, **STILL, **option)
    assert lines(later) == lines(whole)[first - 1 :]
    assert lines(later)[0]["step"] == first


def test_a_step_wins_over_an_epoch(train):
    run = train(max_train_steps=10, initial_step=6, initial_epoch=3)
    assert lines(run)[0]["step"] == 7


def test_files_are_named_as_if_the_steps_before_were_done(train):
    run = train(max_train_steps=9, initial_epoch=2, save_every_n_epochs=1, save_format="kohya")
    names = sorted(path.name for path in run.folder.directory.glob("*.safetensors"))
    assert names == ["lora-000002.safetensors", "lora.safetensors"]


@pytest.mark.parametrize("option", [{"initial_step": 4}, {"initial_epoch": 2}])
def test_a_beginning_behind_the_end_is_refused_before_anything_is_made(train, tmp_path, option):
    with pytest.raises(HyimgError, match="leaves nothing to train: the run has 4 steps in 1 epoch"):
        train(max_train_steps=4, **option)
    assert not (tmp_path / "run0").exists()


def test_a_state_of_another_beginning_is_refused(train, tmp_path):
    folder = tmp_path / "one"
    train(max_train_steps=2, output_dir=folder, save_state=True)
    with pytest.raises(HyimgError, match="`--initial_step`: not given then, 1 now"):
        train(max_train_steps=4, output_dir=folder, resume="latest", initial_step=1)
    train(max_train_steps=4, output_dir=folder, resume="latest")


def test_with_a_beginning_latest_restarts_and_resumes_by_one_command(train, tmp_path):
    given = {"output_dir": tmp_path / "one", "initial_step": 2, "resume": "latest", "save_state": True}
    assert [line["step"] for line in lines(train(max_train_steps=4, **given))] == [3, 4]
    assert [line["step"] for line in lines(train(max_train_steps=6, **given))] == [3, 4, 5, 6]


@pytest.mark.parametrize(("ratio", "epochs"), [(2, [2, 4]), (9, [1, 2, 3, 4]), (1, [])])
def test_a_ratio_of_epochs_saves_so_many_times_at_least(train, report, ratio, epochs):
    run = train(max_train_epochs=5, save_n_epoch_ratio=ratio, save_last_n_epochs=9, save_format="kohya")
    names = sorted(path.name for path in run.folder.directory.glob("lora-*.safetensors"))
    assert names == [f"lora-{epoch:06}.safetensors" for epoch in epochs]
    assert f"save_every_n_epochs = {5 // ratio or 1}" in run.folder.config_path.read_text()
    assert not [text for text in report.warnings if "save_last_n_epochs" in text]
