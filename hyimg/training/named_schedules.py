"""The reference tool's schedules: transformers' functions, and which option is which of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hyimg.config.optimizer import Optimizer as Options
from hyimg.errors import HyimgError


@dataclass(frozen=True)
class Argument:
    """An argument of a schedule's function: the options that make it, and how, given the number of steps."""

    options: tuple[str, ...]
    value: Callable[[Options, int], float | int | None]


def count_steps(given: float, num_steps: int) -> int:
    """A number of steps, or below 1 a fraction of the run, rounded down."""
    return int(given * num_steps) if given < 1 else int(given)


def _stable(options: Options, num_steps: int) -> int:
    both = count_steps(options.lr_warmup_steps, num_steps) + count_steps(options.lr_decay_steps, num_steps)
    if both > num_steps:
        raise HyimgError(
            f"`--lr_warmup_steps` and `--lr_decay_steps` make {both} steps together, of a run of {num_steps}",
            hint="lower them, or give them as fractions",
        )
    return num_steps - both


_WARMUP = Argument(("lr_warmup_steps",), lambda options, n: count_steps(options.lr_warmup_steps, n))
_DECAY = Argument(("lr_decay_steps",), lambda options, n: count_steps(options.lr_decay_steps, n))
_STABLE = Argument((), _stable)
_LENGTH = Argument((), lambda options, n: n)
_CYCLES = Argument(("lr_scheduler_num_cycles",), lambda options, n: options.lr_scheduler_num_cycles)
# transformers counts whole waves; one cycle is half a wave, from the full rate to the lowest
_HALF_WAVES = Argument(_CYCLES.options, lambda options, n: options.lr_scheduler_num_cycles / 2)
_POWER = Argument(("lr_scheduler_power",), lambda options, n: options.lr_scheduler_power)
_TIMESCALE = Argument(("lr_scheduler_timescale",), lambda options, n: options.lr_scheduler_timescale)
_LOWEST = Argument(("lr_scheduler_min_lr_ratio",), lambda options, n: options.lr_scheduler_min_lr_ratio)
_LOWEST_OR_0 = Argument(_LOWEST.options, lambda options, n: options.lr_scheduler_min_lr_ratio or 0.0)

# By name: the function of transformers.optimization, and those of its arguments that have an option
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
}
