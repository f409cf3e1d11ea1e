"""Learning-rate schedules: transformers' by the reference tool's names, and any class at `package.Class`.

A schedule multiplies every group's own rate. It counts optimiser steps: step 1 has the rate that it starts from.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hyimg.config.optimizer import Optimizer as Options
from hyimg.config.option import options_of
from hyimg.errors import HyimgError, did_you_mean
from hyimg.plugins import describe, load_object, parse_arguments
from hyimg.training.named_schedules import NAMED, count_steps
from hyimg.training.optimizers import has_modes, makes_own_rate

MakeSchedule = Callable[[Optimizer, int], "LRScheduler | None"]
"""(optimiser, number of steps) -> its schedule; None where the rates stay as they are."""


# Names without a function: the rates stay, or the optimiser makes them
_CONSTANT, _ADAFACTOR = "constant", "adafactor"


def resolve_scheduler(options: Options) -> MakeSchedule:
    """The schedule that `--lr_scheduler` or `--lr_scheduler_type` names, its arguments bound and checked.

    Raises HyimgError for a class that cannot be imported, an argument that it does not take or that is
    missing, and a warm-up that it has not. `check_schedule_fits` finds what depends on the optimiser,
    `try_schedule` what depends on the run's length.
    """
    arguments = parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    if options.lr_scheduler_type is not None:
        return _of_class(options, options.lr_scheduler_type, arguments)
    name = options.lr_scheduler
    if name in (_CONSTANT, _ADAFACTOR):
        return _without_function(options, name, arguments)
    function_name, own = NAMED[name]
    function = load_object(f"transformers.optimization:{function_name}")
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


def _of_class(options: Options, name: str, arguments: dict[str, Any]) -> MakeSchedule:
    place = name if "." in name else f"torch.optim.lr_scheduler.{name}"
    make_class = load_object(place)
    _refuse_warmup(options, name)
    _check_arguments(make_class, arguments, name=name)

    def make(optimizer: Optimizer, num_steps: int) -> LRScheduler:
        schedule: object = make_class(optimizer, **arguments)
        if not isinstance(schedule, LRScheduler):
            raise HyimgError(f"`{name}` is no schedule: it makes a {type(schedule).__name__}")
        return schedule

    return make


def _without_function(options: Options, name: str, arguments: dict[str, Any]) -> MakeSchedule:
    _refuse_warmup(options, name)
    if arguments:
        raise HyimgError(f"`--lr_scheduler` `{name}` takes no `--lr_scheduler_args`", hint="leave them out")
    return lambda optimizer, num_steps: None


def _refuse_warmup(options: Options, name: str) -> None:
    if options.lr_warmup_steps:
        raise HyimgError(
            f"`--lr_warmup_steps`: the schedule `{name}` has no warm-up",
            hint="use `--lr_scheduler constant_with_warmup`"
            if name == _CONSTANT
            else "leave it out, or use a schedule that has one",
        )


def check_schedule_fits(options: Options, optimizer: Optimizer) -> None:
    """Raises HyimgError for a schedule on an optimiser that takes none, and for `adafactor` on another one."""
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
            f"the schedule `{name}` cannot be used with `{kind}`, which averages the weights in its place",
            hint='leave it out; `--optimizer_args "warmup_steps=100"` is the warm-up of AdamWScheduleFree',
        )
    if makes_own_rate(optimizer):
        raise HyimgError(
            f"the schedule `{name}` cannot be used with `{kind}`, which makes its own rate",
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
                f"`--lr_scheduler_args`: `{name}` takes no argument `{argument}`",
                hint=did_you_mean(argument, takes) or f"its arguments: {', '.join(f'`{t}`' for t in takes)}",
            )
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.name in takes
        if required and parameter.name not in {*arguments, *ours}:
            raise HyimgError(
                f"the schedule `{name}` needs the argument `{parameter.name}`",
                hint=f'give `--lr_scheduler_args "{parameter.name}=..."`',
            )


def try_schedule(make: MakeSchedule, options: Options, optimizer: Optimizer, num_steps: int) -> None:
    """Makes the schedule of a run of `num_steps` steps on an optimiser that may be spoilt, and follows it.

    Raises HyimgError where it refuses its arguments, or ends before the run does.
    """
    name = options.lr_scheduler_type or options.lr_scheduler
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedules that step before an optimiser
            schedule = make(optimizer, num_steps)
            # somebody else's class may end before the run does, as OneCycleLR with its `total_steps`
            for _ in range(num_steps if options.lr_scheduler_type is not None else 1):
                if schedule is not None:
                    schedule.step()
    except HyimgError:
        raise
    except Exception as error:
        raise HyimgError(
            f"the schedule `{name}` cannot be used: {describe(error)}",
            hint=f"it is for a run of {num_steps} steps; mend `--lr_scheduler_args`, or choose another schedule",
        ) from error


def schedule_warnings(options: Options, num_steps: int | None = None) -> list[str]:
    """A sentence for each option that the schedule does not use, and for a warm-up that outlasts the run."""
    name = options.lr_scheduler_type or options.lr_scheduler
    uses: set[str] = set()
    if options.lr_scheduler_type is None and name in NAMED:
        uses = {option for argument in NAMED[name][1].values() for option in argument.options}
    every = {option for _, own in NAMED.values() for argument in own.values() for option in argument.options}
    sentences = [
        f"`--{option.name}` has no effect: the schedule `{name}` does not use it"
        for option in options_of(Options)
        if option.name in every - uses and getattr(options, option.name) != option.default
    ]
    if options.lr_scheduler_type is not None and options.lr_scheduler != _CONSTANT:
        sentences.append("`--lr_scheduler` has no effect beside `--lr_scheduler_type`")
    if num_steps is not None and "lr_warmup_steps" in uses:
        warmup = count_steps(options.lr_warmup_steps, num_steps)
        if warmup > num_steps:
            sentences.append(
                f"the warm-up of {warmup} steps is longer than the run ({num_steps}): the full rate is not reached"
            )
    return sentences
