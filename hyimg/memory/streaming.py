"""The scheduler of streamed weights: which unit is copied into which buffer of the ring, and when.

Blocks run strictly one after another on one stream: forward, in a backward pass from the last to the first
(autograd runs what was recorded later first), and in any order that a caller likes. So one rule is enough:
when a unit is asked for, all computation with the unit asked for before is enqueued, and that one's buffer may
be filled again behind it. Units are copied only ever from the host; they are frozen, and nothing goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from itertools import chain, islice

from hyimg.memory.copy_engine import CopyEngine


class Phase(Enum):
    """What a pass over the units is for, and so which units come next."""

    FORWARD = auto()
    """No backward pass follows (rendering, validation): after the last unit comes the first one again."""
    FORWARD_WITH_GRADIENT = auto()
    """A backward pass follows: after the last unit comes the way back."""
    BACKWARD = auto()
    """The way back, by recomputation or by autograd's own need of weights; then the next forward pass."""


class Streamer:
    """Keeps the unit that is asked for, and the ones that follow, in the slots of a ring.

    Any order of calls is right: after an exception, an early stop, a second forward pass without a backward
    one, or a unit out of turn, the worst is a copy that was not foreseen.
    """

    def __init__(self, num_units: int, num_slots: int, engine: CopyEngine) -> None:
        """More slots than units are not used. One slot works too, and copies nothing ahead."""
        assert num_units > 0
        assert num_slots > 0
        self.num_units = num_units
        self.engine = engine
        # The unit that each slot holds, or that is under way to it
        self._contents: list[int | None] = [None] * min(num_slots, num_units)
        # The slot whose unit was asked for last, and may be in use by computation not yet enqueued
        self._current: int | None = None

    def acquire(self, unit: int, phase: Phase) -> int:
        """The slot that holds the unit, for computation that is enqueued from here to the next call."""
        current = self._current
        if current is not None and self._contents[current] != unit:
            self.engine.mark_used(current)
        ahead = list(islice(upcoming(unit, phase, self.num_units), len(self._contents) - 1))
        slot = self._load(unit, keep={unit, *ahead})
        self._current = slot
        self.engine.wait_for_arrival(slot)
        for following in ahead:
            self._load(following, keep={unit, *ahead})
        return slot

    def forget(self, unit: int) -> None:
        """Copies a unit anew when it is asked for next: its bytes on the host are others now."""
        self._contents = [None if held == unit else held for held in self._contents]

    def unit_in(self, slot: int) -> int | None:
        """The unit that a slot holds or is about to hold."""
        return self._contents[slot]

    def _load(self, unit: int, keep: set[int]) -> int:
        """The slot that holds a unit; where none does, one is filled that holds none of `keep`."""
        if unit in self._contents:
            return self._contents.index(unit)
        slot = next(slot for slot, held in enumerate(self._contents) if held not in keep)
        # Not the unit's until the copy is under way, so that an exception leaves the slot empty
        self._contents[slot] = None
        self.engine.copy(slot, unit)
        self._contents[slot] = unit
        return slot


def upcoming(unit: int, phase: Phase, num_units: int) -> Iterator[int]:
    """The other units in the order in which they will be asked for after `unit`, each once."""
    up, down = range(num_units), range(num_units - 1, -1, -1)
    if phase is Phase.FORWARD:
        order = chain(up[unit + 1 :], up)
    elif phase is Phase.FORWARD_WITH_GRADIENT:
        order = chain(up[unit + 1 :], down)
    else:
        order = chain(reversed(up[:unit]), up)
    return (following for following in dict.fromkeys(order) if following != unit)
