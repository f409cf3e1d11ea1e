"""The rate of every step, against formulas written out here."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

from hyimg.config.option import Only, options_of
from hyimg.config.training import Optimizer as Options
from hyimg.errors import HyimgError
from hyimg.plugins import load_plugins
from hyimg.training.optimizers import resolve_optimizer
from hyimg.training.schedulers import (
    NAMED,
    check_scheduler_fits,
    resolve_scheduler,
    try_scheduler,
    warmup_warning,
)

STEPS = 40
RATE = 0.5


def optimizer(name="AdamW", *pairs):
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    return resolve_optimizer(load_plugins(), name, pairs)([{"params": [parameter], "lr": RATE}], RATE)


def follow(schedule, adamw, count):
    """The rates of the next steps."""
    told = []
    for _ in range(count):
        told.append(adamw.param_groups[0]["lr"])
        adamw.step()
        if schedule is not None:
            schedule.step()
    return told


def rates(**options):
    adamw = optimizer()
    return follow(resolve_scheduler(Options(**options))(adamw, STEPS), adamw, STEPS)


def warmed(warmup, after):
    """The rate of step n (from 0): rising from 0 in `warmup` steps, then `after` of the share of the rest."""

    def rate(n):
        if n < warmup:
            return RATE * n / warmup
        return RATE * after((n - warmup) / (STEPS - warmup))

    return [rate(n) for n in range(STEPS)]


def half_cosine(share):
    return 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_scheduler": "constant"}, [RATE] * STEPS),
        ({"lr_scheduler": "constant_with_warmup"}, [RATE] * STEPS),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10}, warmed(10, lambda share: 1)),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1}, warmed(4, lambda share: 1)),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 8}, warmed(8, lambda share: 1 - share)),
        # 0.21 * 40 = 8.4, rounded down
        ({"lr_scheduler": "linear", "lr_warmup_steps": 0.21}, warmed(8, lambda share: 1 - share)),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 8}, warmed(8, half_cosine)),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 8, "lr_scheduler_num_cycles": 3},
            warmed(8, lambda share: half_cosine(3 * share % 1)),
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_warmup_steps": 8, "lr_scheduler_min_lr_ratio": 0.25},
            warmed(8, lambda share: 0.25 + 0.75 * half_cosine(share)),
        ),
        (
            {
                "lr_scheduler": "cosine_with_min_lr",
                "lr_scheduler_min_lr_ratio": 0.25,
                "lr_scheduler_num_cycles": 3,
            },
            warmed(0, lambda share: 0.25 + 0.75 * half_cosine(3 * share)),
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ("min_lr=0.1",)},
            warmed(0, lambda share: 0.2 + 0.8 * half_cosine(share)),
        ),
        (
            {"lr_scheduler": "polynomial", "lr_warmup_steps": 8, "lr_scheduler_power": 2},
            warmed(8, lambda share: (1e-7 + (RATE - 1e-7) * (1 - share) ** 2) / RATE),
        ),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=0.1",)},
            warmed(0, lambda share: (0.1 + (RATE - 0.1) * (1 - share)) / RATE),
        ),
        (
            {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 8},
            [RATE * (n / 8 if n < 8 else math.sqrt(8 / n)) for n in range(STEPS)],
        ),
        (
            {"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 5},
            [RATE / math.sqrt((n + 5) / 5) for n in range(STEPS)],
        ),
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_warmup_steps": 8,
                "lr_decay_steps": 0.25,
                "lr_scheduler_min_lr_ratio": 0.1,
            },
            # up from the lowest rate, even for 22 steps, and 10 steps of half a cosine
            [RATE * (0.1 + 0.9 * n / 8) for n in range(8)]
            + [RATE] * 22
            + [RATE * (0.1 + 0.9 * half_cosine(n / 10)) for n in range(10)],
        ),
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_decay_steps": 10,
                "lr_scheduler_args": ("decay_type=linear",),
            },
            [RATE] * 30 + [RATE * (1 - n / 10) for n in range(10)],
        ),
        (
            {"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR", "lr_scheduler_args": ("step_size=15",)},
            [RATE] * 15 + [RATE / 10] * 15 + [RATE / 100] * 10,
        ),
        (
            {
                "lr_scheduler_type": "CosineAnnealingLR",
                "lr_scheduler_args": ("T_max=40", "eta_min=0.1"),
            },
            [0.1 + 0.4 * half_cosine(n / 40) for n in range(STEPS)],
        ),
    ],
)
def test_the_rate_of_every_step(options, expected):
    assert rates(**options) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_every_group_keeps_its_ratio_to_the_others():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    adamw = torch.optim.AdamW(
        [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.5, 0.1), strict=True)]
    )
    schedule = resolve_scheduler(Options(lr_scheduler="linear"))(adamw, 4)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in adamw.param_groups])
        adamw.step()
        schedule.step()
    expected = [[0.5, 0.1], [0.375, 0.075], [0.25, 0.05], [0.125, 0.025]]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))


RULES = "step_rules=1:10,0.1:20,0.5"


def test_piecewise_constant_is_that_of_diffusers_which_the_reference_tool_takes():
    from diffusers.optimization import get_piecewise_constant_schedule

    theirs = optimizer()
    expected = follow(get_piecewise_constant_schedule(theirs, RULES.partition("=")[2]), theirs, STEPS)
    assert rates(lr_scheduler="piecewise_constant", lr_scheduler_args=(RULES,)) == expected
    assert sorted(set(expected)) == [0.1 * RATE, 0.5 * RATE, RATE]


@pytest.mark.parametrize("rules", ["0.5", "1:10", "1:20,0.5:10,0.1", "1:x,0.5", "1,0.5", "-1:5,1", "1:5,nan"])
def test_step_rules_of_another_form_are_one_sentence(rules):
    options = Options(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules={rules}",))
    with pytest.raises(HyimgError, match="is not of the form `FACTOR:STEP,...,FACTOR`"):
        try_scheduler(resolve_scheduler(options), options, optimizer(), STEPS)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": (RULES,)},
        {"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 5, "lr_scheduler_num_cycles": 2},
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, "lr_decay_steps": 20},
        {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=0.7", f"total_steps={STEPS}")},
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=7",)},
    ],
    ids=lambda options: next(iter(options.values())),
)
@pytest.mark.parametrize("at", [0, 3, 22])
def test_a_schedule_goes_on_from_its_state_in_json(options, at):
    make = resolve_scheduler(Options(**options))
    whole = optimizer()
    schedule = make(whole, STEPS)
    follow(schedule, whole, at)
    state = json.loads(json.dumps(schedule.state_dict()))
    numbers = json.loads(
        json.dumps([{k: v for k, v in g.items() if k != "params"} for g in whole.param_groups])
    )
    again = optimizer()
    resumed = make(again, STEPS)
    for group, values in zip(again.param_groups, numbers, strict=True):
        group.update(values)
    resumed.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert follow(resumed, again, STEPS - at) == follow(schedule, whole, STEPS - at)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warmup_steps": 10}, "`--lr_warmup_steps`: the LR scheduler `constant` has no warm-up"),
        ({"lr_scheduler_args": ("a=1",)}, "`constant` takes no `--lr_scheduler_args`"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("a=1",)}, "unknown argument `a` of `cosine`"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("last_epoch=1",)}, "unknown argument `last_epoch`"),
        ({"lr_scheduler": "piecewise_constant"}, "`piecewise_constant` needs the argument `step_rules`"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "`cosine_with_min_lr` has no lowest rate"),
        ({"lr_scheduler_type": "StepLR"}, "`StepLR` needs the argument `step_size`"),
        ({"lr_scheduler_type": "StepLRR"}, "`torch.optim.lr_scheduler.StepLRR` cannot be imported"),
        ({"lr_scheduler_type": "nowhere.StepLR"}, "`nowhere.StepLR` cannot be imported"),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=3",), "lr_warmup_steps": 3},
            "the LR scheduler `StepLR` has no warm-up",
        ),
    ],
)
def test_a_schedule_that_cannot_be_made_is_one_sentence(options, message):
    with pytest.raises(HyimgError, match=message):
        resolve_scheduler(Options(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=39")},
            "`OneCycleLR` cannot be used: ValueError: Tried to step 40 times",
        ),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "`ReduceLROnPlateau` cannot be used: .*metrics"),
        ({"lr_scheduler_type": "torch.optim.swa_utils.AveragedModel"}, "AveragedModel` (is no|cannot be)"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 30, "lr_decay_steps": 0.5},
            "make 50 steps together, but the run has 40",
        ),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=0.6",)},
            "`polynomial` cannot be used: .*must be smaller",
        ),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_found_before_the_run(options, message):
    options = Options(**options)
    with pytest.raises(HyimgError, match=message):
        try_scheduler(resolve_scheduler(options), options, optimizer(), STEPS)


def test_a_schedule_that_just_lasts_is_not_refused():
    options = Options(lr_scheduler_type="OneCycleLR", lr_scheduler_args=("max_lr=1", f"total_steps={STEPS}"))
    try_scheduler(resolve_scheduler(options), options, optimizer(), STEPS)


@pytest.mark.parametrize(
    ("schedule", "kind", "message"),
    [
        ("cosine", ("AdamWScheduleFree",), "`cosine` cannot be used with `AdamWScheduleFree`"),
        ("linear", ("Adafactor",), "`linear` cannot be used with `Adafactor`, which makes its own rate"),
        ("adafactor", ("AdamW",), "`AdamW` makes none here"),
        (
            "adafactor",
            ("Adafactor", "relative_step=False"),
            "`Adafactor` makes none here",
        ),
    ],
)
def test_a_schedule_and_an_optimiser_that_exclude_each_other(schedule, kind, message):
    with pytest.raises(HyimgError, match=message):
        check_scheduler_fits(Options(lr_scheduler=schedule), optimizer(*kind))


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        ("constant", ("AdamWScheduleFree",)),
        ("constant", ("Adafactor",)),
        ("adafactor", ("Adafactor",)),
        ("linear", ("Adafactor", "relative_step=False")),
    ],
)
def test_a_schedule_and_an_optimiser_that_go_together(schedule, kind):
    options = Options(lr_scheduler=schedule)
    check_scheduler_fits(options, optimizer(*kind))
    made = resolve_scheduler(options)(optimizer(*kind), STEPS)
    assert (made is None) == (schedule != "linear")


def test_what_is_declared_of_schedules_is_what_their_functions_take():
    every = {option for _, own in NAMED.values() for argument in own.values() for option in argument.options}
    declared = {
        (option.name, name)
        for option in options_of(Options)
        if option.name in every
        for condition in option.needs
        if isinstance(condition, Only)
        for name in condition.values
    }
    taken = {
        (option, name)
        for name, (_, own) in NAMED.items()
        for argument in own.values()
        for option in argument.options
    }
    assert declared == taken | {("lr_decay_steps", "warmup_stable_decay")}  # taken through the stable part


def test_a_warm_up_that_outlasts_the_run_is_warned_of():
    options = Options(lr_scheduler="cosine", lr_warmup_steps=50)
    assert "50 steps is longer than the run (40)" in warmup_warning(options, STEPS)
    assert warmup_warning(options, 50) is None
