"""Who copies streamed weights from the host into the ring of device buffers, and how copies are ordered.

The scheduler (`hyimg.memory.streaming`) knows only `CopyEngine`, so it is the same on the CPU, on CUDA and
against the simulated engine of the tests. A slot is a buffer of the ring, a unit the bytes that fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class CopyEngine(Protocol):
    """Fills slots with units. None of the calls makes the host wait."""

    def copy(self, slot: int, unit: int) -> None:
        """Starts to fill a slot, after the computation that was enqueued before its last `mark_used`."""

    def wait_for_arrival(self, slot: int) -> None:
        """Lets the computation that is enqueued from here on wait for the last copy into the slot."""

    def mark_used(self, slot: int) -> None:
        """Says that the computation which uses the slot's present contents is enqueued."""


class SynchronousCopyEngine:
    """Copies at once: for a device whose memory is the host's, where streaming saves nothing."""

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
    """Copies on a stream of their own, ordered against the computation's stream by events.

    `units` should be page-locked (`hyimg.memory.host_memory`): of pageable memory the driver makes a staged
    copy, which is right and slow.
    """

    def __init__(self, slots: Sequence[Tensor], units: Sequence[Tensor]) -> None:
        """Both are bytes (uint8), the slots on the device and the units on the host."""
        self.slots = slots
        self.units = units
        self.num_bytes = 0
        self.device = slots[0].device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # The slots' memory may have been something else's, whose computation is still enqueued
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for slot in slots:
            slot.record_stream(self.stream)  # and may be something else's when the ring is let go
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
        assert arrival is not None, "a slot is filled before it is waited for"
        torch.cuda.current_stream(self.device).wait_event(arrival)

    def mark_used(self, slot: int) -> None:
        self._used[slot] = torch.cuda.current_stream(self.device).record_event()
