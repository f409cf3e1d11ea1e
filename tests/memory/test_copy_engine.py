"""The CUDA side of streaming, through doubles of torch's streams and events and of the CUDA runtime.

The double executes nothing: it keeps what must have happened before each operation, as a device would, so that
whatever the lanes' speeds are, a copy and a computation on one slot are seen to be ordered or not.
"""

from __future__ import annotations

import contextlib
import gc
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyimg.memory import host_memory
from hyimg.memory.host_memory import HostBuffer
from hyimg.memory.streaming import CudaCopyEngine, Phase, Streamer


class Event:
    """What a stream had to do when this was recorded: a set of operations."""

    def __init__(self, before: frozenset[int]) -> None:
        self.before = before


class Stream:
    """Operations run in the order of the calls, and after the events that were waited for."""

    num_operations = 0

    def __init__(self, device: object = None) -> None:
        self.before: frozenset[int] = frozenset()

    def run(self) -> tuple[int, frozenset[int]]:
        """An operation: its number, and all that has happened before it."""
        Stream.num_operations += 1
        before, self.before = self.before, self.before | {Stream.num_operations}
        return Stream.num_operations, before

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before

    def wait_event(self, event: Event) -> None:
        self.before |= event.before

    def record_event(self) -> Event:
        return Event(self.before)


class Slot:
    """A buffer on the device, which knows what was done with it and asks that it was in order."""

    device = torch.device("cuda", 0)

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams
        self.written: int | None = None
        self.read: set[int] = set()
        self.held_for: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.held_for.append(stream)

    def __getitem__(self, part: slice) -> Slot:
        return self

    def copy_(self, source: Any, non_blocking: bool) -> None:
        assert non_blocking
        number, before = self.streams[-1].run()
        assert self.read <= before, "filled while a computation reads it"
        self.written, self.read = number, set()

    def compute(self, stream: Stream) -> None:
        number, before = stream.run()
        assert self.written in before, "read before it is filled"
        self.read.add(number)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The stack of current streams, the computation's below; torch's functions work on it."""
    stack = [Stream()]

    @contextlib.contextmanager
    def within(stream: Stream):
        stack.append(stream)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stack[-1])
    return stack


@pytest.mark.parametrize("seed", range(10))
def test_copies_and_computation_on_a_slot_are_ordered_for_any_sequence_of_calls(streams, seed):
    draw = random.Random(seed)
    num_units, num_slots = draw.randint(2, 6), draw.randint(1, 4)
    compute = streams[0]
    freed, _ = compute.run()  # of a tensor that was where a slot is now
    slots = [Slot(streams) for _ in range(min(num_slots, num_units))]
    for slot in slots:
        slot.read.add(freed)
    engine = CudaCopyEngine(slots, [torch.empty(8, dtype=torch.uint8)] * num_units)
    assert all(slot.held_for == [engine.stream] for slot in slots)
    streamer = Streamer(num_units, num_slots, engine)
    for _ in range(200):
        slot = streamer.acquire(draw.randrange(num_units), draw.choice(list(Phase)))
        for _ in range(draw.randint(0, 2)):
            slots[slot].compute(compute)
        if draw.random() < 0.1:
            streamer.forget(draw.randrange(num_units))


def test_prefetches_overlap_with_computation(streams):
    slots = [Slot(streams) for _ in range(2)]
    engine = CudaCopyEngine(slots, [torch.empty(8, dtype=torch.uint8)] * 4)
    streamer = Streamer(4, 2, engine)
    for unit in range(3):
        slot = slots[streamer.acquire(unit, Phase.FORWARD)]
        slot.compute(streams[0])
        assert not slot.read & engine.stream.before, "the next unit is copied while this one computes"


class Runtime:
    """The calls of the CUDA runtime that lock memory."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.calls: list[str] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        self.calls.append(f"lock {num_bytes}")
        return 2 if self.refuses else 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append("unlock")
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch):
    def call(*, refuses: bool) -> Runtime:
        made = Runtime(refuses)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.calls.append(f"wait for {device}"))
        return made

    return call


def test_locked_memory_is_unlocked_when_the_buffer_is_freed_and_its_copies_are_done(runtime):
    cuda = runtime(refuses=False)
    buffer = HostBuffer({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}, lock=True)
    assert buffer.locked
    assert cuda.calls == ["lock 1024"]
    view = buffer.view("a")
    del buffer
    gc.collect()
    assert cuda.calls[1:] == ["wait for 1", "unlock"]
    assert view.sum() == 3, "who holds a view still has the memory"


def test_memory_that_cannot_be_locked_is_used_unlocked(runtime, monkeypatch):
    cuda = runtime(refuses=True)
    cleared = []
    monkeypatch.setattr(host_memory, "_clear_last_error", cleared.append)
    buffer = HostBuffer({"a": torch.arange(3)}, lock=True)
    assert not buffer.locked
    assert cleared == [torch.device("cuda")], "the refusal is not left to the next launch"
    assert buffer.view("a").tolist() == [0, 1, 2]
    del buffer
    gc.collect()
    assert "unlock" not in cuda.calls


def test_the_error_is_cleared_by_a_kernel():
    """Factories such as `zeros` may be a memset, which leaves the error to the next launch."""
    operations = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func)
            return func(*args, **(kwargs or {}))

    with Recording():
        host_memory._clear_last_error(torch.device("cpu"))
    assert torch.Tag.pointwise in operations[-1].tags
    assert "fill" not in operations[-1].name()
    assert "zero" not in operations[-1].name()


def test_parameters_move_into_the_buffer_and_free_their_memory():
    parameters = {name: nn.Parameter(torch.full((5,), value)) for name, value in (("a", 1.0), ("b", 2.0))}
    buffer = HostBuffer(parameters, lock=False)
    for name, parameter in parameters.items():
        assert parameter.data_ptr() == buffer.view(name).data_ptr()
    assert [parameter[0].item() for parameter in parameters.values()] == [1.0, 2.0]
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters.values()}) == 1
