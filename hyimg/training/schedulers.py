"""LR schedulers: transformers' by the reference tool's names, and any class at `package.Class`.

A scheduler multiplies the rate of every parameter group. It counts optimiser steps: step 1 has the initial rate.
"""

from __future__ import annotations

import bisect
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hyimg.config.training import Optimizer as Options
from hyimg.errors import HyimgError, did_you_mean
from hyimg.plugins import load_object
from hyimg.plugins.arguments import check_kinds, parse_arguments
from hyimg.plugins.guard import guarded
from hyimg.training.optimizers import has_modes, makes_own_rate


@dataclass(frozen=True)
class Argument:
    """An argument of a scheduler's function: the options that it depends on, and its value for a number of steps."""

    options: tuple[str, ...]
    value: Callable[[Options, int], float | int | None]


def count_steps(given: float, num_steps: int) -> int:
    """A number of steps, or below 1 a fraction of the run, rounded down."""
    return int(given * num_steps) if given < 1 else int(given)


def _stable(options: Options, num_steps: int) -> int:
    both = count_steps(options.lr_warmup_steps, num_steps) + count_steps(options.lr_decay_steps, num_steps)
    if both > num_steps:
        raise HyimgError(
            f"`--lr_warmup_steps` and `--lr_decay_steps` make {both} steps together, but the run has {num_steps}",
            hint="lower them, or give them as fractions",
        )
    return num_steps - both


_WARMUP = Argument(("lr_warmup_steps",), lambda options, n: count_steps(options.lr_warmup_steps, n))
_DECAY = Argument(("lr_decay_steps",), lambda options, n: count_steps(options.lr_decay_steps, n))
_STABLE = Argument((), _stable)
_LENGTH = Argument((), lambda options, n: n)
_CYCLES = Argument(("lr_scheduler_num_cycles",), lambda options, n: options.lr_scheduler_num_cycles)
# transformers counts full periods; a cycle here is half of one, from the full to the lowest rate
_HALF_WAVES = Argument(_CYCLES.options, lambda options, n: options.lr_scheduler_num_cycles / 2)
_POWER = Argument(("lr_scheduler_power",), lambda options, n: options.lr_scheduler_power)
_TIMESCALE = Argument(("lr_scheduler_timescale",), lambda options, n: options.lr_scheduler_timescale)
_LOWEST = Argument(("lr_scheduler_min_lr_ratio",), lambda options, n: options.lr_scheduler_min_lr_ratio)
_LOWEST_OR_0 = Argument(_LOWEST.options, lambda options, n: options.lr_scheduler_min_lr_ratio or 0.0)


def piecewise_constant(optimizer: torch.optim.Optimizer, step_rules: str) -> LambdaLR:
    """A piecewise constant factor on the rate, as in diffusers.

    `step_rules` is `FACTOR:STEP,FACTOR:STEP,...,FACTOR`: each factor holds until that many steps are done, the
    last one to the end of the run. `1:100,0.5:200,0.1` is the full rate for 100 steps, half of it for the next
    100, then a tenth. Raises HyimgError for rules of another form, and for steps that do not rise.
    """
    *rules, last = str(step_rules).split(",")
    try:
        pairs = [(int(step), float(factor)) for factor, step in (rule.split(":") for rule in rules)]
        final = float(last)
    except ValueError:
        pairs, final = [], -1.0
    ends = [step for step, _ in pairs]
    factors = [*(factor for _, factor in pairs), final]
    rising = all(before < after for before, after in zip([0, *ends], ends, strict=False))
    if not pairs or not rising or not all(0 <= factor < math.inf for factor in factors):
        raise HyimgError(
            f"`step_rules={step_rules}` in `--lr_scheduler_args` is not of the form `FACTOR:STEP,...,FACTOR`, "
            "with rising steps",
            hint='write for example `"step_rules=1:100,0.5:200,0.1"`: the full rate for 100 steps, half of it for '
            "the next 100, then a tenth",
        )
    return LambdaLR(optimizer, lambda step: factors[bisect.bisect_right(ends, step)])


# By name: the function (of transformers.optimization, where no module is said), and those of its arguments that have
# an option
NAMED: Mapping[str, tuple[str, Mapping[str, Argument]]] = {
    "constant_with_warmup": ("get_constant_schedule_with_warmup", {"num_warmup_steps": _WARMUP}),
    "linear": (
        "get_linear_schedule_with_warmup",
        {"num_warmup_steps": _WARMUP, "num_training_steps": _LENGTH},
    ),
    "cosine": (
        "get_cosine_schedule_with_warmup",
        {"num_warmup_steps": _WARMUP, "num_training_steps": _LENGTH},
    ),
    "cosine_with_restarts": (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_warmup_steps": _WARMUP, "num_training_steps": _LENGTH, "num_cycles": _CYCLES},
    ),
    "cosine_with_min_lr": (
        "get_cosine_with_min_lr_schedule_with_warmup",
        {
            "num_warmup_steps": _WARMUP,
            "num_training_steps": _LENGTH,
            "num_cycles": _HALF_WAVES,
            "min_lr_rate": _LOWEST,
        },
    ),
    "warmup_stable_decay": (
        "get_wsd_schedule",
        {
            "num_warmup_steps": _WARMUP,
            "num_stable_steps": _STABLE,
            "num_decay_steps": _DECAY,
            "num_cycles": _HALF_WAVES,
            "min_lr_ratio": _LOWEST_OR_0,
        },
    ),
    "polynomial": (
        "get_polynomial_decay_schedule_with_warmup",
        {"num_warmup_steps": _WARMUP, "num_training_steps": _LENGTH, "power": _POWER},
    ),
    "inverse_sqrt": (
        "get_inverse_sqrt_schedule",
        {"num_warmup_steps": _WARMUP, "timescale": _TIMESCALE},
    ),
    "piecewise_constant": ("hyimg.training.schedulers:piecewise_constant", {}),
}


MakeScheduler = Callable[[Optimizer, int], "LRScheduler | None"]
"""(optimiser, number of steps) -> its LR scheduler; None for constant rates."""


# Names without a function: the rates stay, or the optimiser makes them
_CONSTANT, _ADAFACTOR = "constant", "adafactor"


def resolve_scheduler(options: Options) -> MakeScheduler:
    """The scheduler of `--lr_scheduler` or `--lr_scheduler_type`, its arguments bound and checked.

    Raises HyimgError for a class that cannot be imported, an argument that it does not take or that is
    missing, and a warm-up that it has not. `check_scheduler_fits` finds what depends on the optimiser,
    `try_scheduler` what depends on the run's length.
    """
    arguments = parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    if options.lr_scheduler_type is not None:
        return _of_class(options, options.lr_scheduler_type, arguments)
    name = options.lr_scheduler
    if name in (_CONSTANT, _ADAFACTOR):
        return _without_function(options, name, arguments)
    function_name, own = NAMED[name]
    place = function_name if ":" in function_name else f"transformers.optimization:{function_name}"
    function = load_object(place)
    _check_arguments(function, arguments, name=name, ours=own)
    if (
        name == "cosine_with_min_lr"
        and options.lr_scheduler_min_lr_ratio is None
        and "min_lr" not in arguments
    ):
        raise HyimgError(
            f"`--lr_scheduler` `{name}` has no lowest rate",
            hint="give `--lr_scheduler_min_lr_ratio`, say 0.1",
        )

    def make(optimizer: Optimizer, num_steps: int) -> LRScheduler:
        values = {key: argument.value(options, num_steps) for key, argument in own.items()}
        schedule: LRScheduler = function(optimizer, **{**values, **arguments})
        return schedule

    return make


def _of_class(options: Options, name: str, arguments: dict[str, Any]) -> MakeScheduler:
    place = name if "." in name else f"torch.optim.lr_scheduler.{name}"
    make_class = load_object(place)
    _refuse_warmup(options, name)
    _check_arguments(make_class, arguments, name=name)

    def make(optimizer: Optimizer, num_steps: int) -> LRScheduler:
        schedule: object = make_class(optimizer, **arguments)
        if not isinstance(schedule, LRScheduler):
            raise HyimgError(f"`{name}` is not an LR scheduler: it returns a {type(schedule).__name__}")
        return schedule

    return make


def _without_function(options: Options, name: str, arguments: dict[str, Any]) -> MakeScheduler:
    _refuse_warmup(options, name)
    if arguments:
        raise HyimgError(f"`--lr_scheduler` `{name}` takes no `--lr_scheduler_args`", hint="leave them out")
    return lambda optimizer, num_steps: None


def _refuse_warmup(options: Options, name: str) -> None:
    if options.lr_warmup_steps:
        raise HyimgError(
            f"`--lr_warmup_steps`: the LR scheduler `{name}` has no warm-up",
            hint="use `--lr_scheduler constant_with_warmup`"
            if name == _CONSTANT
            else "leave it out, or use a schedule that has one",
        )


def check_scheduler_fits(options: Options, optimizer: Optimizer) -> None:
    """Raises HyimgError for a scheduler on an optimiser that has its own rate, and for `adafactor` on another one."""
    name = options.lr_scheduler_type or options.lr_scheduler
    kind = type(optimizer).__name__
    if name == _ADAFACTOR and not makes_own_rate(optimizer):
        raise HyimgError(
            f"`--lr_scheduler` `{name}` is the rate that Adafactor makes itself, and `{kind}` makes none here",
            hint='use `--optimizer_type Adafactor --optimizer_args "relative_step=True"`, or another schedule',
        )
    if name in (_CONSTANT, _ADAFACTOR):
        return
    if has_modes(optimizer):
        raise HyimgError(
            f"the LR scheduler `{name}` cannot be used with `{kind}`, which averages the weights in its place",
            hint='leave it out; `--optimizer_args "warmup_steps=100"` is the warm-up of AdamWScheduleFree',
        )
    if makes_own_rate(optimizer):
        raise HyimgError(
            f"the LR scheduler `{name}` cannot be used with `{kind}`, which makes its own rate",
            hint='leave it out, or give `--optimizer_args "relative_step=False" "scale_parameter=False" '
            '"warmup_init=False"`',
        )


def _check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, name: str, ours: Collection[str] = ()
) -> None:
    _, *parameters = inspect.signature(function).parameters.values()  # the first is the optimiser
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    # a resumed run puts the schedule where it was, by its state
    takes = [p.name for p in parameters if p.name != "last_epoch"]
    for argument in arguments:
        if argument not in takes:
            raise HyimgError(
                f"unknown argument `{argument}` of `{name}` in `--lr_scheduler_args`",
                hint=did_you_mean(argument, takes) or f"its arguments: {', '.join(f'`{t}`' for t in takes)}",
            )
    check_kinds(function, arguments, option="--lr_scheduler_args", name=name)
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.name in takes
        if required and parameter.name not in {*arguments, *ours}:
            raise HyimgError(
                f"the LR scheduler `{name}` needs the argument `{parameter.name}`",
                hint=f'give `--lr_scheduler_args "{parameter.name}=..."`',
            )


def try_scheduler(make: MakeScheduler, options: Options, optimizer: Optimizer, num_steps: int) -> None:
    """Creates the scheduler of a run of `num_steps` steps on a throw-away optimiser, and steps through it.

    Raises HyimgError if it rejects its arguments, or ends before the run.
    """
    name = options.lr_scheduler_type or options.lr_scheduler
    hint = f"the run has {num_steps} steps; change `--lr_scheduler_args`, or choose another scheduler"
    with guarded(f"the LR scheduler `{name}` cannot be used", hint=hint), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of schedules that step before an optimiser
        schedule = make(optimizer, num_steps)
        # somebody else's class may end before the run does, as OneCycleLR with its `total_steps`
        for _ in range(num_steps if options.lr_scheduler_type is not None else 1):
            if schedule is not None:
                schedule.step()


def warmup_warning(options: Options, num_steps: int) -> str | None:
    """A sentence for a warm-up that outlasts the run, else None."""
    if options.lr_scheduler_type is not None or options.lr_scheduler not in NAMED:
        return None
    arguments = NAMED[options.lr_scheduler][1].values()
    if not any("lr_warmup_steps" in argument.options for argument in arguments):
        return None
    warmup = count_steps(options.lr_warmup_steps, num_steps)
    if warmup <= num_steps:
        return None
    return f"the warm-up of {warmup} steps is longer than the run ({num_steps}): the full rate is not reached"
