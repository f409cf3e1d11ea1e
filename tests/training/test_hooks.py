"""Each hook's example in its documentation is a whole plugin that does what it says."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyimg import hookspecs
from hyimg.cli.app import run as run_command
from hyimg.config.dataset_options import DatasetOptions
from hyimg.data.captions import CaptionContext, CaptionTransforms
from hyimg.plugins import load_plugins

HOOKS = [name for name in dir(hookspecs) if name.startswith("hyimg_")]


@pytest.fixture
def example(request, tmp_path):
    """The example of the hook that the test is named after, as a file for `--plugin`."""
    hook = request.node.name.removeprefix("test_")
    text = inspect.getdoc(getattr(hookspecs, hook))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert f"def {hook}(" in code
    file = tmp_path / f"{hook}.py"
    file.write_text(textwrap.dedent(code), encoding="utf-8")
    return str(file)


def lines(run):
    return [json.loads(line) for line in run.folder.metrics_path.read_text(encoding="utf-8").splitlines()]


def test_every_hook_has_a_test_here():
    assert all(f"test_{hook}" in globals() for hook in HOOKS)


def test_hyimg_losses(train, example):
    once, twice = (
        lines(train(plugin=("spy", example), loss_type="quartic", loss_args=(f"weight={weight}",)))[0]["loss"]
        for weight in (1, 2)
    )
    assert twice == pytest.approx(2 * once)


def test_hyimg_samplers(example):
    sampler = load_plugins([example]).resolve("samplers", "clipped_euler")
    told = []

    def denoise(x, sigma):
        return torch.full_like(x, 3.0)

    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    x = sampler(
        denoise, torch.ones(1, 1, 2, 2), sigmas, lambda step, x, denoised: told.append(step), stop=0.5
    )
    assert x.unique().tolist() == [3.0]
    assert told == [0, 1], "the levels below 0.5 are left out"


def test_hyimg_timestep_samplers(train, example):
    options = {"plugin": ("spy", example), "timestep_sampling": "power"}
    low = train(**options, timestep_sampling_args=("exponent=50",))
    draws = [run.objective.timestep_sampler(torch_draws(), None).tolist() for run in (low, train(**options))]
    assert draws == [pytest.approx([0.5**50]), pytest.approx([0.25])]


def torch_draws():
    from hyimg.flow.timesteps import Draws

    return Draws(torch.tensor([0.5]), torch.tensor([0.0]))


def test_hyimg_optimizers(train, example):
    run = train(
        plugin=("spy", example),
        optimizer_type="nesterov",
        optimizer_args=("momentum=0.5",),
        learning_rate=0.1,
    )
    (group,) = run.optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.5, True)


def test_hyimg_networks(train, example):
    run = train(
        plugin=("spy", example), network_module="Rows", network_args=("start=0.5",), learning_rate=0.1
    )
    path = run.folder.lora_path()
    saved = load_file(path)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert {key.rpartition(".")[2] for key in saved} == {"rows", "columns", "alpha"}
    assert bool(saved[f"{name}.rows"].any()), "it was trained"
    assert saved[f"{name}.columns"].mean() == pytest.approx(0.5, abs=0.2)
    assert not (path.parent / "comfy").exists(), "ComfyUI has no name for it"


def test_hyimg_caption_transforms(example):
    options = DatasetOptions(
        dataset_config=Path("x"), caption_transform=("Lower",), caption_transform_args=("keep=GO",)
    )
    transforms = CaptionTransforms.of(options, [example])
    assert transforms("A Sign: GO", CaptionContext(Path("x.png"))) == "a sign: GO"
    assert transforms("A Sign: GO", CaptionContext(Path("x.png"), is_reg=True)) == "A Sign: GO"


def test_hyimg_commands(example, tmp_path, capsys):
    (tmp_path / "cat.txt").write_text("a cat on a mat", encoding="utf-8")
    command = ["--plugin", example, "count-words", str(tmp_path / "cat.txt")]
    assert run_command([*command, "--least", "2"]) == 0
    assert capsys.readouterr().out == "3\n"
    assert run_command([*command[:-1], str(tmp_path / "dog.txt")]) == 2
    assert "error: there is no file" in capsys.readouterr().err


def test_hyimg_run_start(train, example, report, monkeypatch):
    notes = []
    monkeypatch.setattr(report, "note", notes.append)
    train(plugin=("spy", example), seed=5)
    assert "lora: 1 steps, seed 5" in notes


def test_hyimg_step_end(train, example):
    run = train(plugin=("spy", example), max_train_steps=2)
    for line in lines(run):
        assert line["loss_worst"] == pytest.approx(line["loss"]), "of one image"


def test_hyimg_epoch_end(train, example, report, monkeypatch):
    notes = []
    monkeypatch.setattr(report, "note", notes.append)
    run = train(plugin=("spy", example), max_train_steps=None, max_train_epochs=2)
    told = [note for note in notes if note.startswith("epoch ")]
    assert len(told) == 2
    assert told[-1] == f"epoch 2: smoothed loss {run.losses.value:.4f}"


def test_hyimg_run_end(train, example):
    run = train(plugin=("spy", example), max_train_steps=2)
    assert (run.folder.directory / "done.txt").read_text(encoding="utf-8") == "2 steps\n"
