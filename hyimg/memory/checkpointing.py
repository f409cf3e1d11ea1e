"""Gradient checkpointing of the blocks. All options give bit-identical gradients, and trade time for memory.

- checkpointing keeps the inputs of a block and runs it again in the backward pass
- keeping attention also saves the attention's output, so that the second run skips the most expensive kernel
- offloading moves the saved inputs to host memory between the forward and the backward pass

Offloading copies in parallel with the computation: to the host while the next blocks run, and back one block before
they are recomputed. The host never waits for a copy; the computation waits, on the device, for the one that it needs.
One lane serves both directions, which are used in different halves of a step, and its order makes it safe to reuse
host buffers, which are kept from step to step. `Offloader` knows only the protocol `CopyLane`, so that the same code
runs on the CPU (where it saves nothing), on CUDA and with the tests' simulated lane.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hyimg.config.models import TrainingMemory
from hyimg.memory.host_memory import UNLOCKED_WARNING, HostBuffer
from hyimg.model.attention import Attend
from hyimg.model.dit import RunBlock

# A block's inputs stay on the device until this many further blocks have started, for their copy to finish
_BLOCKS_UNDER_WAY = 2


class CopyLane(Protocol):
    """Copies between host and device that run one after another, in the order of the calls."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Allocates host memory (uint8) for copies."""

    def copy(self, destination: Tensor, source: Tensor) -> Any:
        """Starts a copy after all computation enqueued so far, and returns its ticket.

        Both tensors must stay alive until `wait` is called with the ticket.
        """

    def wait(self, ticket: Any) -> None:
        """Makes computation enqueued from here on wait for a copy."""

    def free(self, buffer: Tensor) -> None:
        """Frees an allocation after all copies have finished; the host waits for them."""


class SynchronousLane:
    """Copies synchronously, for devices that share the host's memory."""

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        destination.copy_(source)

    def wait(self, ticket: None) -> None:
        pass

    def free(self, buffer: Tensor) -> None:
        pass


class CudaLane:
    """A CUDA stream, ordered against the computation's stream by events.

    Device memory is allocated and freed on the computation's stream. Each copy starts after what was enqueued there
    before it, and the computation waits for it before the memory is used or freed. So the caching allocator needs no
    `record_stream`, which frees memory late and would raise the peak.
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
        self._locked[buffer.bytes.data_ptr()] = buffer  # unlocks its pages when it is freed
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
    """Reusable host buffers for tensors whose sizes vary with bucket and prompt.

    A buffer that is too small is replaced by a larger one; small tensors do not use large buffers.
    """

    def __init__(self, lane: CopyLane) -> None:
        self._lane = lane
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """The smallest free buffer of at least that size, or a new one."""
        # not a far larger one, which a larger tensor will need
        fitting = [buffer for buffer in self._free if num_bytes <= len(buffer) <= 2 * _rounded(num_bytes)]
        if fitting:
            return self._remove(min(fitting, key=len))
        smaller = [buffer for buffer in self._free if len(buffer) < num_bytes]
        if smaller:
            self._lane.free(self._remove(max(smaller, key=len)))
        return self._lane.allocate(_rounded(num_bytes))

    def give_back(self, buffers: list[Tensor]) -> None:
        """Returns buffers; only appends, since it is called whenever a graph is freed."""
        self._free.extend(buffers)

    def _remove(self, buffer: Tensor) -> Tensor:
        return self._free.pop(next(i for i, free in enumerate(self._free) if free is buffer))

    @property
    def free_bytes(self) -> int:
        """Bytes that are allocated and unused."""
        return sum(len(buffer) for buffer in self._free)


def _rounded(num_bytes: int) -> int:
    """Rounds up by at most an eighth, so that a few more text tokens need no new buffer."""
    step = 1 << max(num_bytes.bit_length() - 4, 9)
    return -(-num_bytes // step) * step


@dataclass(eq=False)
class _Offloaded:
    """A tensor: its copy on the host, and, while a copy is running or awaited, the one on the device."""

    group: int
    on_host: Tensor
    device: torch.device
    on_device: Tensor | None
    ticket: Any
    received: bool = False


class Offloader:
    """Moves the inputs of blocks to the host and back; one for a model and all its steps.

    Each `inputs()` makes a group: the tensors that a block's checkpoint saves. Groups are numbered in the order of the
    forward pass and needed in reverse; an exception, a dropped graph or two graphs at once cost at most an
    unnecessary copy.
    """

    def __init__(self, lane: CopyLane) -> None:
        self.lane = lane
        self.pool = HostPool(lane)
        self._groups: weakref.WeakValueDictionary[int, _Group] = weakref.WeakValueDictionary()
        self._num_groups = 0
        # Those with a tensor on the device, so that none is freed before its copy has finished
        self._on_device: list[_Offloaded] = []

    @staticmethod
    def for_device(device: torch.device) -> Offloader:
        """The offloader for a device."""
        return Offloader(CudaLane(device) if device.type == "cuda" else SynchronousLane())

    @contextlib.contextmanager
    def inputs(self) -> Iterator[None]:
        """Offloads the hidden states (B, tokens, D) that autograd saves in the block; wraps a call of `checkpoint`.

        Tensors of fewer dimensions stay: the conditioning vector is small, and shared by all blocks.
        """
        group = _Group(self, self._num_groups)
        self._num_groups += 1
        self._groups[group.number] = group
        self._release({group.number - i for i in range(_BLOCKS_UNDER_WAY)})
        with torch.autograd.graph.saved_tensors_hooks(group.pack, group.unpack):
            yield

    def send(self, tensor: Tensor, number: int, buffer: Tensor) -> _Offloaded:
        """Starts the copy of a tensor into a host buffer."""
        tensor = tensor.detach()
        on_host = buffer[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        sent = _Offloaded(number, on_host, tensor.device, tensor, self.lane.copy(on_host, tensor))
        self._on_device.append(sent)
        return sent

    def fetch(self, number: int) -> None:
        """Starts copying a group's tensors to the device, except those that were there or are on their way."""
        group = self._groups.get(number)
        for offloaded in group.tensors if group else ():
            if offloaded.on_device is None and not offloaded.received:
                offloaded.on_device = torch.empty_like(offloaded.on_host, device=offloaded.device)
                offloaded.ticket = self.lane.copy(offloaded.on_device, offloaded.on_host)
                self._on_device.append(offloaded)

    def receive(self, wanted: _Offloaded) -> Tensor:
        """The tensor on the device, for computation enqueued from here on."""
        if wanted.received:  # a second backward pass
            for offloaded in self._groups[wanted.group].tensors:
                offloaded.received = False
        self._release({wanted.group, wanted.group - 1})
        self.fetch(wanted.group)
        tensor = wanted.on_device
        assert tensor is not None
        self._let_go(wanted)
        wanted.received = True
        # After this group's copies, in parallel with its recomputation and backward pass
        self.fetch(wanted.group - 1)
        return tensor

    def _release(self, but: set[int]) -> None:
        """Frees the device memory of all other groups."""
        for offloaded in list(self._on_device):
            if offloaded.group not in but:
                self._let_go(offloaded)

    def _let_go(self, offloaded: _Offloaded) -> None:
        self.lane.wait(offloaded.ticket)
        offloaded.on_device = offloaded.ticket = None
        self._on_device.remove(offloaded)


class _Group:
    """The hooks of a block's checkpoint. Autograd owns it; when it is freed, its host buffers return to the pool."""

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
    """Whether the elements fill their memory in some order: only then does `empty_like` keep the strides."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


# Only inputs are offloaded, not the attention that is kept. torch 2.15 asks for a decision, and has the argument
_KEPT_STAYS = (
    {"respect_saved_tensors_hooks": False}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
    else {}
)

# Attention operators without their namespaces: torch's, for all devices, and those of flash-attn and xformers, whose
# namespaces have changed between versions
_ATTENTION_OPERATOR = re.compile(
    r"_scaled_dot_product_\w+"
    r"|_?(efficient|flash)_attention_forward\w*"
    r"|_?flash_attn(_varlen)?_forward"
    r"|flash_fwd"
)


def checkpointed(run: RunBlock, options: TrainingMemory, device: torch.device) -> RunBlock:
    """Wraps `run` to recompute a block in the backward pass instead of keeping its activations.

    Returns `run` itself if the options do not ask for that, and calls only it when no gradients are recorded.
    The recomputation calls `run` again, within the backward pass and in reverse order, and may leave it by an
    exception as soon as everything needed is recomputed.
    """
    if not options.checkpoints_blocks:
        return run
    offloader = Offloader.for_device(device) if options.cpu_offload_checkpointing else None

    def run_checkpointed(block: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(block, *args)
        contexts: dict[str, Any] = {}
        if options.checkpoint_keep == "attention":
            kept = _KeptAttention(attend=args[-1])
            args, contexts = (*args[:-1], kept), {"context_fn": kept.contexts, **_KEPT_STAYS}
        with offloader.inputs() if offloader else contextlib.nullcontext():
            return checkpoint(
                run,
                block,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a block uses torch's generators
                **contexts,
            )

    return run_checkpointed


class _KeptAttention:
    """A block's attention; its operators run only in the forward pass, and the recomputation gets their results.

    Uses torch's selective checkpointing, limited to the attention: its modes slow down every operator, and the compiler
    does not work under them.
    """

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.mode: AbstractContextManager[Any] = contextlib.nullcontext()

    def __call__(self, q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        with self.mode:
            return self.attend(q_BTNK, k_BTNK, v_BTNK)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the forward pass and of the recomputation."""
        keeping, replaying = create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
            _keep_attention
        )
        return self._within(keeping), self._within(replaying)

    @contextlib.contextmanager
    def _within(self, mode: AbstractContextManager[Any]) -> Iterator[None]:
        self.mode = mode
        try:
            yield
        finally:
            self.mode = contextlib.nullcontext()


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator).split(".")[-2:-1]  # namespace.name.overload
    is_attention = bool(name) and _ATTENTION_OPERATOR.fullmatch(name[0]) is not None
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
