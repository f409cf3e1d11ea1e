"""Block streaming on a DiT: blocks whose weights live in host memory and pass through a ring of device buffers.

Only the weights of Linears are streamed (with fp8 their scales too): all but a thousandth of a block. Biases,
norms and adapters stay on the device. Outside of a run a streamed parameter is its host copy, so that what
reads or writes the model's parameters sees the only ones there are; while a block runs, its parameters are
views of a slot.

Weights are wanted a second time in the backward pass. Under checkpointing a block is run again there, which
asks for its unit, and the slot holds it until the next block is run. Otherwise autograd would keep views of a
slot that is filled anew; what is saved instead is which unit and which part of it, and the backward pass
asks the streamer for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from hyimg.memory.copy_engine import CopyEngine, CudaCopyEngine, SynchronousCopyEngine
from hyimg.memory.host_memory import HostBuffer
from hyimg.memory.streaming import Phase, Streamer
from hyimg.memory.swap_plan import SwapPlan
from hyimg.model.dit import DiT, RunBlock
from hyimg.model.layers import Linear

NUM_SLOTS = 2
"""One unit computes while the next one arrives."""

# (slots, units) -> the engine that copies between them
MakeEngine = Callable[[Sequence[Tensor], Sequence[Tensor]], CopyEngine]


@dataclass(frozen=True)
class _SlotView:
    """What autograd keeps in place of a view of a slot."""

    unit: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    start: int


class BlockSwap:
    """Streams the units of a plan through slots on `device`; `run` is a way to run the model's blocks.

    The streamed weights of the DiT must be in host memory; they are moved into page-locked buffers, unit by
    unit, and the model's parameters become views of those. `checkpointing` says that `run` is called inside
    of a checkpoint, and then `forward_pass` must be around that.
    """

    def __init__(
        self,
        dit: DiT,
        plan: SwapPlan,
        device: torch.device,
        *,
        checkpointing: bool = False,
        num_slots: int = NUM_SLOTS,
        make_engine: MakeEngine | None = None,
    ) -> None:
        assert plan.units
        self.device = device
        self.checkpointing = checkpointing
        self._unit_of: dict[nn.Module, int] = {}
        self._prefix_of: dict[nn.Module, str] = {}
        self.buffers: list[HostBuffer] = []
        for number, names in enumerate(plan.units):
            for name in names:
                block = dit.get_submodule(name)
                self._unit_of[block], self._prefix_of[block] = number, f"{name}."
            self.buffers.append(_move_to_buffer(dit, names, lock=device.type == "cuda"))
        units = [buffer.bytes for buffer in self.buffers]
        largest = max(len(unit) for unit in units)
        num_slots = min(num_slots, len(units))
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        make_engine = make_engine or (CudaCopyEngine if device.type == "cuda" else SynchronousCopyEngine)
        self.engine = make_engine(self.slots, units)
        self.streamer = Streamer(len(units), num_slots, self.engine)
        self._slot_at = {slot.untyped_storage().data_ptr(): number for number, slot in enumerate(self.slots)}
        self._views: dict[tuple[nn.Module, int], dict[str, Tensor]] = {}
        self._in_forward_pass = False

    @property
    def is_locked(self) -> bool:
        """Whether all host memory is page-locked."""
        return all(buffer.locked for buffer in self.buffers)

    @property
    def host_bytes(self) -> int:
        return sum(buffer.bytes.nbytes for buffer in self.buffers)

    @property
    def ring_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    def run(self, block: nn.Module, *args: Any) -> Any:
        """Calls a block, its weights in a slot where it is a streamed one."""
        unit = self._unit_of.get(block)
        if unit is None:
            return block(*args)
        if not torch.is_grad_enabled():
            return self._call(block, unit, Phase.FORWARD, args)
        if self.checkpointing:
            phase = Phase.FORWARD_WITH_GRADIENT if self._in_forward_pass else Phase.BACKWARD
            return self._call(block, unit, phase, args)
        # Not inside of a checkpoint: there these hooks would hide the block's activations from it
        with saved_tensors_hooks(self._pack, self._unpack):
            return self._call(block, unit, Phase.FORWARD_WITH_GRADIENT, args)

    def around_checkpoint(self, run: RunBlock) -> RunBlock:
        """`run`, which checkpoints: what it runs before it returns is the forward pass, and what later the way back."""

        def run_in_forward_pass(block: nn.Module, *args: Any) -> Any:
            with self._forward_pass():
                return run(block, *args)

        return run_in_forward_pass

    @contextlib.contextmanager
    def _forward_pass(self) -> Iterator[None]:
        self._in_forward_pass = True
        try:
            yield
        finally:
            self._in_forward_pass = False

    def _call(self, block: nn.Module, unit: int, phase: Phase, args: tuple[Any, ...]) -> Any:
        slot = self.streamer.acquire(unit, phase)
        return functional_call(block, self._weights(block, unit, slot), args)

    def _weights(self, block: nn.Module, unit: int, slot: int) -> dict[str, Tensor]:
        """The streamed parameters of a block, by their names in it, as views of a slot."""
        if (block, slot) not in self._views:
            prefix = self._prefix_of[block]
            self._views[block, slot] = {
                name.removeprefix(prefix): field.view(self.slots[slot])
                for name, field in self.buffers[unit].fields.items()
                if name.startswith(prefix)
            }
        return self._views[block, slot]

    def _pack(self, tensor: Tensor) -> Tensor | _SlotView:
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        unit = None if slot is None else self.streamer.unit_in(slot)
        if unit is None:
            return tensor
        return _SlotView(unit, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Tensor | _SlotView) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        slot = self.slots[self.streamer.acquire(packed.unit, Phase.BACKWARD)]
        return slot.view(packed.dtype).as_strided(packed.size, packed.stride, packed.start)


def streamed_parameters(block: nn.Module) -> list[str]:
    """The names, in a block, of what is streamed of it: the weights of its Linears, and their scales."""
    return [
        f"{path}.{leaf}"
        for path, module in block.named_modules()
        if isinstance(module, Linear)
        for leaf, _ in module.named_parameters(recurse=False)
        if leaf != "bias"
    ]


def _move_to_buffer(dit: DiT, blocks: Sequence[str], *, lock: bool) -> HostBuffer:
    """The streamed parameters of blocks in one buffer, which the model then holds in place of its own."""
    names = [f"{block}.{name}" for block in blocks for name in streamed_parameters(dit.get_submodule(block))]
    buffer = HostBuffer({name: dit.get_parameter(name).detach() for name in names}, lock=lock)
    for name in names:
        dit.get_parameter(name).data = buffer.view(name)
    return buffer
