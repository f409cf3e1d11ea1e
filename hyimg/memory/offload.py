"""The inputs of checkpointed blocks in host memory between the forward and the backward pass.

Copies run on a lane of their own beside the computation: to the host while the next blocks are computed, back
one block ahead of the recomputation. The host never waits for a copy; the computation waits, on the device,
for the one that it needs. There is one lane for both directions: they are used in different halves of a step,
and its order makes every reuse of a host buffer safe. Host buffers are used again from step to step.

`Offloader` knows only the protocol `CopyLane`, so that the same code runs on the CPU (where it saves nothing),
on CUDA and against the simulated lane of the tests.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hyimg.memory.host_memory import UNLOCKED_WARNING, HostBuffer

# A block's inputs stay on the device while this many further blocks start: so long may their copy take
_BLOCKS_UNDER_WAY = 2


class CopyLane(Protocol):
    """Copies between host and device, which run one after another in the order of the calls."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Host memory (uint8) of that size which the lane can copy from and to."""

    def copy(self, destination: Tensor, source: Tensor) -> Any:
        """Starts a copy that waits for all computation enqueued so far, and returns its ticket.

        Both tensors must stay alive until `wait` was called with it.
        """

    def wait(self, ticket: Any) -> None:
        """Lets the computation enqueued from here on wait for a copy."""

    def free(self, buffer: Tensor) -> None:
        """Gives what was allocated back, as soon as no copy is under way; the host waits for that."""


class SynchronousLane:
    """Copies at once, for devices whose memory is the host's."""

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        destination.copy_(source)

    def wait(self, ticket: None) -> None:
        pass

    def free(self, buffer: Tensor) -> None:
        pass


class CudaLane:
    """A CUDA stream, ordered against the computation's by events.

    Device memory is allocated and freed on the computation's stream. Each copy starts after what was enqueued
    there when it was asked for, and the computation waits for it before the memory is used or freed: so the
    caching allocator needs no `record_stream`, whose late returns would raise the peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._locked: dict[int, HostBuffer] = {}
        self._has_warned = False
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, num_bytes: int) -> Tensor:
        with torch.cuda.device(self.device):
            buffer = HostBuffer.empty(num_bytes, lock=True)
        if not (buffer.locked or self._has_warned):
            self._has_warned = True
            warnings.warn(UNLOCKED_WARNING, stacklevel=2)
        self._locked[buffer.bytes.data_ptr()] = buffer  # unlocks its pages when it goes
        return buffer.bytes

    def copy(self, destination: Tensor, source: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)
        event: torch.cuda.Event = self.stream.record_event()
        return event

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def free(self, buffer: Tensor) -> None:
        self.stream.synchronize()
        del self._locked[buffer.data_ptr()]


class HostPool:
    """Host buffers that are given back and taken again, for tensors whose sizes vary with bucket and prompt.

    One that is too small is replaced by a larger one; small tensors leave the large buffers alone.
    """

    def __init__(self, lane: CopyLane) -> None:
        self._lane = lane
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """A buffer of at least that size, the smallest of the free ones."""
        # not one of another kind of tensor, far larger, whose own tensor would then find none
        fitting = [buffer for buffer in self._free if num_bytes <= len(buffer) <= 2 * _rounded(num_bytes)]
        if fitting:
            return self._remove(min(fitting, key=len))
        smaller = [buffer for buffer in self._free if len(buffer) < num_bytes]
        if smaller:
            self._lane.free(self._remove(max(smaller, key=len)))
        return self._lane.allocate(_rounded(num_bytes))

    def give_back(self, buffers: list[Tensor]) -> None:
        """Called when a graph is freed, at whatever moment: it only appends."""
        self._free.extend(buffers)

    def _remove(self, buffer: Tensor) -> Tensor:
        return self._free.pop(next(i for i, free in enumerate(self._free) if free is buffer))

    @property
    def free_bytes(self) -> int:
        """What is allocated and not in use."""
        return sum(len(buffer) for buffer in self._free)


def _rounded(num_bytes: int) -> int:
    """Up to an eighth more, so that a few more text tokens do not ask for a new buffer."""
    step = 1 << max(num_bytes.bit_length() - 4, 9)
    return -(-num_bytes // step) * step


@dataclass(eq=False)
class _Offloaded:
    """One tensor: its copy on the host, and while a copy is under way or awaited, the one on the device."""

    group: int
    on_host: Tensor
    device: torch.device
    on_device: Tensor | None
    ticket: Any


class Offloader:
    """Moves the inputs of blocks to the host and back; one for a model, used for all its steps.

    Each `inputs()` makes a group: what one block's checkpoint saves. Groups are numbered in the order of the
    forward pass, and wanted again in reverse; whatever else happens (an exception, a graph that is dropped, two
    graphs at a time) costs at most a copy that was not needed.
    """

    def __init__(self, lane: CopyLane) -> None:
        self.lane = lane
        self.pool = HostPool(lane)
        self._groups: weakref.WeakValueDictionary[int, _Group] = weakref.WeakValueDictionary()
        self._num_groups = 0
        # Those with a tensor on the device. They are held here, so that none is freed before its copy is done
        self._on_device: list[_Offloaded] = []

    @staticmethod
    def for_device(device: torch.device) -> Offloader:
        """An offloader from and to that device."""
        return Offloader(CudaLane(device) if device.type == "cuda" else SynchronousLane())

    @contextlib.contextmanager
    def inputs(self) -> Iterator[None]:
        """Offloads the hidden states that autograd saves inside: use it around one call of `checkpoint`.

        Hidden states are (B, tokens, D). What has fewer dimensions, the conditioning vector, is small and the
        same in all blocks, and stays.
        """
        group = _Group(self, self._num_groups)
        self._num_groups += 1
        self._groups[group.number] = group
        self._release({group.number - i for i in range(_BLOCKS_UNDER_WAY)})
        with torch.autograd.graph.saved_tensors_hooks(group.pack, group.unpack):
            yield

    def send(self, tensor: Tensor, number: int, buffer: Tensor) -> _Offloaded:
        """Starts the copy of a tensor to the host, into the buffer."""
        tensor = tensor.detach()
        on_host = buffer[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        sent = _Offloaded(number, on_host, tensor.device, tensor, self.lane.copy(on_host, tensor))
        self._on_device.append(sent)
        return sent

    def fetch(self, number: int) -> None:
        """Starts the copies of a group's tensors to the device, where they are not there or under way."""
        group = self._groups.get(number)
        for offloaded in group.tensors if group else ():
            if offloaded.on_device is None:
                offloaded.on_device = torch.empty_like(offloaded.on_host, device=offloaded.device)
                offloaded.ticket = self.lane.copy(offloaded.on_device, offloaded.on_host)
                self._on_device.append(offloaded)

    def receive(self, wanted: _Offloaded) -> Tensor:
        """The tensor on the device again, for computation that is enqueued from here on."""
        self._release({wanted.group, wanted.group - 1})
        self.fetch(wanted.group)
        tensor = wanted.on_device
        assert tensor is not None
        self._let_go(wanted)
        # Behind this group's copies, and beside its recomputation and backward pass
        self.fetch(wanted.group - 1)
        return tensor

    def _release(self, but: set[int]) -> None:
        """Frees device memory of all groups but those."""
        for offloaded in list(self._on_device):
            if offloaded.group not in but:
                self._let_go(offloaded)

    def _let_go(self, offloaded: _Offloaded) -> None:
        self.lane.wait(offloaded.ticket)
        offloaded.on_device = offloaded.ticket = None
        self._on_device.remove(offloaded)


class _Group:
    """The hooks of one block's checkpoint. Autograd owns it; with it go its host buffers, back to the pool."""

    def __init__(self, offloader: Offloader, number: int) -> None:
        self.offloader = offloader
        self.number = number
        self.tensors: list[_Offloaded] = []
        self._buffers: list[Tensor] = []
        weakref.finalize(self, offloader.pool.give_back, self._buffers).atexit = False

    def pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if tensor.dim() < 3 or not _is_dense(tensor):
            return tensor
        self._buffers.append(self.offloader.pool.take(tensor.nbytes))
        self.tensors.append(self.offloader.send(tensor, self.number, self._buffers[-1]))
        return self.tensors[-1]

    def unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        return packed if isinstance(packed, Tensor) else self.offloader.receive(packed)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory, in whatever order: `empty_like` keeps the strides of those only."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()
