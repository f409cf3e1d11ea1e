"""The scheduler of streamed weights, and the engines that copy them from the host to the device.

A slot is a buffer of a ring on the device, a unit the bytes that fill it. Blocks run one after another on one stream:
forward, in the backward pass from last to first, or in any other order. So one rule is enough: when a unit is
acquired, all computation with the unit before is enqueued, and that one's slot may be refilled after it. Units are
frozen, so they are never copied back.

`Streamer` knows only the protocol `CopyEngine`, so that the same code runs on the CPU, on CUDA and with the tests'
simulated engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum, auto
from itertools import chain, islice
from typing import Protocol

import torch
from torch import Tensor


class CopyEngine(Protocol):
    """Fills slots with units. No call blocks the host."""

    def copy(self, slot: int, unit: int) -> None:
        """Starts filling a slot, after the computation that was enqueued before its last `mark_used`."""

    def wait_for_arrival(self, slot: int) -> None:
        """Makes computation enqueued from here on wait for the last copy into the slot."""

    def mark_used(self, slot: int) -> None:
        """Marks that all computation with the slot's current contents is enqueued."""


class SynchronousCopyEngine:
    """Copies synchronously: for devices that share the host's memory, and for those without an engine."""

    def __init__(self, slots: Sequence[Tensor], units: Sequence[Tensor]) -> None:
        """Both are bytes (uint8), a unit no larger than a slot."""
        self.slots = slots
        self.units = units
        self.num_bytes = 0

    def copy(self, slot: int, unit: int) -> None:
        source = self.units[unit]
        self.slots[slot][: len(source)].copy_(source)
        self.num_bytes += len(source)

    def wait_for_arrival(self, slot: int) -> None:
        pass

    def mark_used(self, slot: int) -> None:
        pass


class CudaCopyEngine:
    """Copies on a separate stream, ordered against the computation's stream by events.

    `units` should be page-locked (`hyimg.memory.host_memory`): from pageable memory copies are correct but slow.
    """

    def __init__(self, slots: Sequence[Tensor], units: Sequence[Tensor]) -> None:
        """Both are bytes (uint8), the slots on the device and the units on the host."""
        self.slots = slots
        self.units = units
        self.num_bytes = 0
        self.device = slots[0].device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # Enqueued computation may still use the slots' memory for what it held before
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for slot in slots:
            slot.record_stream(self.stream)  # nor may it be reused too early when the ring is freed
        self._arrival: list[torch.cuda.Event | None] = [None] * len(slots)
        self._used: list[torch.cuda.Event | None] = [None] * len(slots)

    def copy(self, slot: int, unit: int) -> None:
        source = self.units[unit]
        used = self._used[slot]
        if used is not None:
            self.stream.wait_event(used)
        with torch.cuda.stream(self.stream):
            self.slots[slot][: len(source)].copy_(source, non_blocking=True)
        self._arrival[slot] = self.stream.record_event()
        self.num_bytes += len(source)

    def wait_for_arrival(self, slot: int) -> None:
        arrival = self._arrival[slot]
        assert arrival is not None, "nothing was copied to this slot"
        torch.cuda.current_stream(self.device).wait_event(arrival)

    def mark_used(self, slot: int) -> None:
        self._used[slot] = torch.cuda.current_stream(self.device).record_event()


class Phase(Enum):
    """The kind of pass over the units, which decides the units that come next."""

    FORWARD = auto()
    """Without a backward pass (rendering, validation): after the last unit comes the first again."""
    FORWARD_WITH_GRADIENT = auto()
    """Before a backward pass: after the last unit, the order reverses."""
    BACKWARD = auto()
    """The backward pass, which recomputes blocks or needs their weights; then comes the next forward pass."""


class Streamer:
    """Keeps the current unit and the next ones in the slots of a ring.

    Any order of calls is correct: an exception, an early stop, or a unit out of order costs at most a copy that was
    not prefetched.
    """

    def __init__(self, num_units: int, num_slots: int, engine: CopyEngine) -> None:
        """Uses at most as many slots as units. With one slot nothing is prefetched."""
        assert num_units > 0
        assert num_slots > 0
        self.num_units = num_units
        self.engine = engine
        # The unit that each slot holds or is being filled with
        self._contents: list[int | None] = [None] * min(num_slots, num_units)
        # The slot acquired last, which computation that is not yet enqueued may use
        self._current: int | None = None

    def acquire(self, unit: int, phase: Phase) -> int:
        """Returns the slot that holds the unit, for computation that is enqueued until the next call."""
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
        """Copies a unit again when it is acquired next, because its bytes on the host have changed."""
        self._contents = [None if held == unit else held for held in self._contents]

    def unit_in(self, slot: int) -> int | None:
        """The unit that a slot holds or is being filled with."""
        return self._contents[slot]

    def _load(self, unit: int, keep: set[int]) -> int:
        """The slot that holds a unit; if none does, fills one that holds none of `keep`."""
        if unit in self._contents:
            return self._contents.index(unit)
        slot = next(slot for slot, held in enumerate(self._contents) if held not in keep)
        # Assigned after the copy has started, so that an exception leaves the slot empty
        self._contents[slot] = None
        self.engine.copy(slot, unit)
        self._contents[slot] = unit
        return slot


def upcoming(unit: int, phase: Phase, num_units: int) -> Iterator[int]:
    """The other units, each once, in the order in which they will be acquired after `unit`."""
    up, down = range(num_units), range(num_units - 1, -1, -1)
    if phase is Phase.FORWARD:
        order = chain(up[unit + 1 :], up)
    elif phase is Phase.FORWARD_WITH_GRADIENT:
        order = chain(up[unit + 1 :], down)
    else:
        order = chain(reversed(up[:unit]), up)
    return (following for following in dict.fromkeys(order) if following != unit)
