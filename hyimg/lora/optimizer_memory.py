"""What an optimiser remembers of a network's float32 parameters, in bytes, from their shapes alone. No torch.

By what each optimiser keeps with its default arguments; `tests/lora/test_optimizer_memory.py` compares the table with
the optimisers themselves. Left out: numbers of which there is one a tensor, and the two code tables (1 kB each) of
8-bit states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hyimg.lora.plan import ModulePlan

# bitsandbytes: below so many values a state stays in float32, above it has a float32 scale for each block
_MIN_8BIT_VALUES = 4096
_8BIT_BLOCK = 256


@dataclass(frozen=True)
class TrainedParameter:
    """A tensor that is trained; up matrices start at zero."""

    shape: tuple[int, ...]
    starts_at_zero: bool = False

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _State:
    """How many of each an optimiser keeps for a parameter.

    `full` float32 copies, `eight_bit` copies in 8 bits, `factored` pairs of a value a row and a value a column (a
    copy where there are no two dimensions), `starts` copies of start values, none where those are zero.
    """

    full: int = 0
    eight_bit: int = 0
    factored: int = 0
    starts: int = 0

    def num_bytes(self, parameter: TrainedParameter) -> int:
        num = parameter.num_values
        copies = self.full + (0 if parameter.starts_at_zero else self.starts)
        if num < _MIN_8BIT_VALUES:
            of_8bit = 4 * num
        else:
            of_8bit = num + 4 * math.ceil(num / _8BIT_BLOCK)
        shape = parameter.shape
        pair = num // shape[-1] + num // shape[-2] if len(shape) > 1 else num
        return 4 * copies * num + self.eight_bit * of_8bit + 4 * self.factored * pair


_STATES = {
    "adamw": _State(full=2),
    "adamw8bit": _State(eight_bit=2),
    "pagedadamw": _State(full=2),
    "pagedadamw8bit": _State(eight_bit=2),
    "adafactor": _State(factored=1),
    "lion": _State(full=1),
    "lion8bit": _State(eight_bit=1),
    "pagedlion8bit": _State(eight_bit=1),
    "prodigy": _State(full=3, starts=1),
    "came": _State(full=1, factored=2),
    "adamwschedulefree": _State(full=2),
    "radamschedulefree": _State(full=2),
    "sgdschedulefree": _State(full=1),
    "sgdnesterov": _State(full=1),
}


def optimizer_bytes(optimizer: str, parameters: Iterable[TrainedParameter]) -> int | None:
    """The size of the state of a built-in optimiser (any case); None for another one."""
    state = _STATES.get(optimizer.lower())
    return None if state is None else sum(state.num_bytes(parameter) for parameter in parameters)


def trained_parameters(plans: Iterable[ModulePlan]) -> Iterator[TrainedParameter]:
    """The tensors that a network of these modules hands to its optimiser."""
    for plan in plans:
        if plan.rank == 0 or plan.learning_rate == 0:
            continue
        for height in plan.parts or (plan.out_features,):
            yield TrainedParameter((plan.rank, plan.in_features))
            yield TrainedParameter((height, plan.rank), starts_at_zero=True)
        if plan.dora:
            yield TrainedParameter((plan.out_features, 1))
