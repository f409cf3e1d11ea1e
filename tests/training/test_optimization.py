"""The options of optimiser, schedule and precision in a run: what they do there, and what excludes what."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from hyimg.checkpoints.safetensors_file import read_header
from hyimg.config.commands import TrainConfig
from hyimg.config.load import make
from hyimg.errors import HyimgError
from hyimg.memory.precision import decide_precision
from hyimg.plugins import load_plugins
from hyimg.report import SilentReporter
from hyimg.training.metrics import COST_FIELDS
from hyimg.training.optimization import prepare_optimization

PLAIN = {"max_train_steps": 6, "learning_rate": 1e-2, "max_grad_norm": 0}


def metrics(run):
    return [json.loads(line) for line in run.folder.metrics_path.read_text().splitlines()]


def same_weights(run, other):
    files = [load_file(r.folder.directory / "lora.safetensors") for r in (run, other)]
    return all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_type": "AdamW"},
        {"optimizer_type": "AdamW8bit", "mixed_precision": "bf16", "full_bf16": True},
        {"optimizer_type": "Adafactor"},
        {"optimizer_type": "CAME", "gradient_checkpointing": True},
        {"optimizer_type": "RAdamScheduleFree", "network_args": ("network_reg_lrs=img_mlp=1e-3",)},
        {"optimizer_type": "Lion", "optimizer_schedulefree_wrapper": True},
    ],
    ids=lambda options: options["optimizer_type"],
)
def test_a_fused_run_is_the_plain_one_bit_for_bit(train, options):
    plain = train(**PLAIN, **options)
    fused = train(**PLAIN, **options, fused_backward_pass=True)
    assert fused.stepper.fused is not None
    assert same_weights(plain, fused)
    timed = [[{**line, **dict.fromkeys(COST_FIELDS, 0)} for line in metrics(run)] for run in (plain, fused)]
    assert timed[0] == timed[1]


@pytest.mark.parametrize(
    ("options", "message", "way_out"),
    [
        ({"gradient_accumulation_steps": 2}, "it frees each gradient", "batch_size"),
        ({"max_grad_norm": 1.0}, "gradient clipping", "--max_grad_norm 0"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16", "bf16"),
        ({"optimizer_type": "Prodigy"}, "with `Prodigy`: its step uses all", "AdamW"),
    ],
)
def test_a_fused_run_is_refused_where_it_cannot_be(train, options, message, way_out):
    given = {"fused_backward_pass": True, "max_grad_norm": 0} | options
    with pytest.raises(HyimgError, match=f"`--fused_backward_pass` cannot be used .*{message}") as caught:
        train(**given)
    assert way_out in caught.value.hint


def test_a_fused_run_cannot_leave_a_step_out():
    given = {"fused_backward_pass": True, "max_grad_norm": 0, "on_nan": "skip"}
    config = make(TrainConfig, {"dit": "d", "dataset_config": "c", "output_dir": "o", **given})
    precision = decide_precision(config.compute, torch.device("cpu"))
    with pytest.raises(HyimgError, match="`--fused_backward_pass` cannot be used with `--on_nan skip`"):
        prepare_optimization(config, load_plugins(), [], precision=precision, report=SilentReporter())


def test_a_schedule_is_followed_in_optimiser_steps_whatever_the_accumulation(train):
    run = train(
        max_train_steps=5,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        lr_scheduler="linear",
        lr_warmup_steps=0.4,
    )
    told = [line["learning_rate"] for line in metrics(run)]
    assert told == pytest.approx([0, 0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_the_schedule_of_a_run_of_epochs_is_as_long_as_they_are(train):
    run = train(max_train_epochs=2, learning_rate=1e-2, lr_scheduler="linear")
    assert [line["learning_rate"] for line in metrics(run)] == pytest.approx(
        [0.01 * n / 8 for n in range(8, 0, -1)]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=7")},
            "`OneCycleLR` cannot be used",
        ),
        ({"lr_scheduler": "cosine", "optimizer_type": "AdamWScheduleFree"}, "averages the weights"),
        (
            {"lr_scheduler": "cosine", "optimizer_schedulefree_wrapper": True},
            "`cosine` cannot be used with `ScheduleFreeOptimizer`, which averages the weights",
        ),
        (
            {"ema_decay": 0.9, "optimizer_schedulefree_wrapper": True},
            "`--ema_decay` cannot be used with `--optimizer_schedulefree_wrapper`, which averages the weights itself",
        ),
        ({"full_bf16": True}, "`--full_bf16` needs `--mixed_precision bf16`, not `no`"),
        ({"full_fp16": True, "mixed_precision": "bf16"}, "`--full_fp16` needs `--mixed_precision fp16`"),
        ({"full_fp16": True, "mixed_precision": "fp16"}, "`AdamW` cannot train weights in fp16"),
        (
            {"optimizer_type": "Prodigy", "network_args": ("network_reg_lrs=img_mlp=1e-3",)},
            "`Prodigy` cannot make a step",
        ),
    ],
)
def test_what_cannot_be_is_found_before_the_model_is_read(train, monkeypatch, options, message):
    monkeypatch.setattr("hyimg.memory.dit_loader.load_dit", lambda *a, **k: pytest.fail("the model was read"))
    with pytest.raises(HyimgError, match=message):
        train(max_train_epochs=2, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_type": "AdamWScheduleFree"},
        {"optimizer_type": "Lion", "optimizer_schedulefree_wrapper": True},
    ],
    ids=lambda options: options["optimizer_type"],
)
def test_the_saved_weights_of_a_schedule_free_run_are_the_averages_and_saving_changes_nothing(train, options):
    options = PLAIN | options
    once, often = train(**options), train(**options, save_every_n_steps=1)
    assert same_weights(once, often)
    saved = load_file(once.folder.directory / "lora.safetensors")
    trained = once.network.state()
    assert any(not torch.equal(saved[name], trained[name]) for name in saved)


def test_a_wrapped_optimiser_is_named_in_the_file_and_has_its_arguments(train):
    run = train(
        **PLAIN | {"max_train_steps": 1},
        optimizer_type="Lion",
        optimizer_args=("weight_decay=0.5",),
        optimizer_schedulefree_wrapper=True,
        schedulefree_wrapper_args=("momentum=0.7",),
    )
    assert (run.optimizer.momentum, run.optimizer.param_groups[0]["weight_decay"]) == (0.7, 0.5)
    metadata = read_header(run.saved[0]).metadata
    assert metadata["ss_optimizer"].startswith("bitsandbytes.optim.lion.Lion")
    assert metadata["ss_optimizer_schedulefree_wrapper"] == "True"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optimizer_type": "AdamWScheduleFree", "optimizer_schedulefree_wrapper": True},
            "`--optimizer_schedulefree_wrapper` has no effect: `AdamWScheduleFree` is schedule-free already",
        ),
        (
            {"optimizer_type": "SGDNesterov8bit"},
            "`SGDNesterov8bit` is SGD with plain momentum: bitsandbytes has no Nesterov momentum",
        ),
    ],
)
def test_what_an_optimiser_ignores_is_said(train, report, options, words):
    train(**options)
    assert words in report.warnings


def test_a_prodigy_run_tells_the_rate_that_it_found(train):
    run = train(optimizer_type="Prodigy", learning_rate=1.0, max_train_steps=8)
    lines = metrics(run)
    assert {line["learning_rate"] for line in lines} == {1.0}
    assert lines[-1]["effective_learning_rate"] > lines[0]["effective_learning_rate"] > 0


# ---- precision


def test_a_run_in_fp16_trains_float32_adapters_with_a_scaled_loss(train):
    run = train(mixed_precision="fp16", max_train_steps=4, learning_rate=1e-3)
    assert run.objective.dit.dtype == torch.float16
    assert {p.dtype for p in run.network.parameters()} == {torch.float32}
    lines = metrics(run)
    assert {line["loss_scale"] for line in lines} == {65536.0}
    exact = metrics(train(max_train_steps=4, learning_rate=1e-3))
    for line, reference in zip(lines, exact, strict=True):
        # float16 has 11 bits; the sums of a tiny model lose a few of them
        assert line["loss"] == pytest.approx(reference["loss"], rel=2e-3)
        assert line["gradient_norm"] == pytest.approx(reference["gradient_norm"], rel=2e-2)


def test_an_overflow_leaves_the_step_out_and_halves_the_scale(train, spy):
    # at the first scale the answer's gradient is 65536, just beyond float16
    spy.losses["steep"] = lambda prediction, target, context: prediction.sum((1, 2, 3))
    run = train(mixed_precision="fp16", loss_type="steep", max_train_steps=6, learning_rate=1e-4)
    lines = metrics(run)
    left_out = [line for line in lines if line["gradient_norm"] is None]
    assert 0 < len(left_out) < 6
    assert lines[: len(left_out)] == left_out, "then it trains"
    assert [line["loss_scale"] for line in left_out] == [65536 / 2**n for n in range(len(left_out))]
    assert all(math.isfinite(line["loss"]) for line in lines)
    state = run.optimizer.state[run.stepper.parameters[0]]
    assert state["step"] == 6 - len(left_out)


def test_adapters_in_16_bits_are_trained_as_such(train):
    bf16 = train(mixed_precision="bf16", full_bf16=True, max_train_steps=3, learning_rate=1e-2)
    fp16 = train(
        mixed_precision="fp16",
        full_fp16=True,
        optimizer_type="AdamW8bit",
        max_train_steps=3,
        learning_rate=1e-2,
    )
    for run, dtype in ((bf16, torch.bfloat16), (fp16, torch.float16)):
        assert {p.dtype for p in run.network.parameters()} == {dtype}
        ups = [tensor for name, tensor in run.network.state().items() if name.endswith("up.weight")]
        assert all(bool(up.any()) for up in ups)
        assert all(math.isfinite(line["gradient_norm"]) for line in metrics(run))


@pytest.fixture
def warnings_of(train, monkeypatch):
    """The warnings of a run with these options."""

    def call(**options):
        told = []
        monkeypatch.setattr(SilentReporter, "warning", lambda self, text: told.append(text))
        train(**options)
        return told

    return call


def test_what_has_no_effect_is_told(warnings_of):
    assert warnings_of() == []
    assert warnings_of(optimizer_type="Adafactor") == []
    (told,) = warnings_of(optimizer_type="Prodigy", learning_rate=1e-4)
    assert "the given one, 0.0001: use about 1" in told
    (told,) = warnings_of(optimizer_type="PagedAdamW8bit")
    assert "`PagedAdamW8bit`: paging has no effect" in told
