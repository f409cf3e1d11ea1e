"""Block streaming on a DiT: blocks whose weights live in host memory and pass through a ring of device buffers.

Only the weights of Linears are streamed (with fp8 their scales too): all but a thousandth of a block. Biases,
norms and adapters stay on the device. Outside of a run a streamed parameter is its host copy, so that what
reads or writes the model's parameters sees the only ones there are; while a block runs, its parameters are
views of a slot.

Weights are wanted a second time in the backward pass. Under checkpointing a block is run again there, which
asks for its unit, and the slot holds it until the next block is run. Otherwise autograd would keep views of a
slot that is filled anew; what is saved instead is which unit and which part of it, and the backward pass
asks the streamer for that.

A slot is never read after it was refilled: blocks run one after another, and autograd runs the nodes of a later
block, whose sequence numbers are higher, before those of an earlier one; so when a unit is asked for, nothing
is left to do with the unit before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hyimg.memory.copy_engine import CopyEngine, CudaCopyEngine, SynchronousCopyEngine
from hyimg.memory.host_memory import HostBuffer
from hyimg.memory.streaming import Phase, Streamer
from hyimg.memory.swap_plan import SwapPlan
from hyimg.model.dit import DiT, RunBlock
from hyimg.model.layers import Linear

NUM_SLOTS = 2
"""One unit computes while the next one arrives."""

# A module, the name of its parameter, and what is there while a block runs
_Lent = tuple[nn.Module, str, nn.Parameter]

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
    of a checkpoint, and then `around_checkpoint` must be around that.
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
        self.buffers: list[HostBuffer] = []
        self._parameters: list[list[nn.Parameter]] = []
        names_of: dict[nn.Module, str] = {}
        is_cuda = device.type == "cuda"
        for number, names in enumerate(plan.units):
            blocks = {name: dit.get_submodule(name) for name in names}
            parameters = {
                f"{name}.{leaf}": block.get_parameter(leaf)
                for name, block in blocks.items()
                for leaf in streamed_parameters(block)
            }
            with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
                self.buffers.append(HostBuffer(parameters, lock=is_cuda))
            self._parameters.append(list(parameters.values()))
            for name, block in blocks.items():
                self._unit_of[block], names_of[block] = number, name
        self._versions = [self._version(number) for number in range(len(plan.units))]
        units = [buffer.bytes for buffer in self.buffers]
        largest = max(len(unit) for unit in units)
        num_slots = min(num_slots, len(units))
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        make_engine = make_engine or (CudaCopyEngine if is_cuda else SynchronousCopyEngine)
        self.engine = make_engine(self.slots, units)
        self.streamer = Streamer(len(units), num_slots, self.engine)
        self._slot_at = {slot.untyped_storage().data_ptr(): number for number, slot in enumerate(self.slots)}
        self._lent = {
            (block, slot): self._lend(block, names_of[block], buffer)
            for block in self._unit_of
            for slot, buffer in enumerate(self.slots)
        }
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
        lent = self._lent[block, self._acquire(unit, phase)]
        own = [(module, leaf, module.get_parameter(leaf)) for module, leaf, _ in lent]
        try:
            _set_parameters(lent)
            return block(*args)
        finally:
            _set_parameters(own)

    def _lend(self, block: nn.Module, name: str, slot: Tensor) -> list[_Lent]:
        """The streamed parameters of a block as views of a slot.

        Parameters too, of the same dtypes and shapes: to the compiler a block is as it was.
        """
        fields = self.buffers[self._unit_of[block]].fields
        lent = []
        for path in streamed_parameters(block):
            view = nn.Parameter(fields[f"{name}.{path}"].view(slot), requires_grad=False)
            module, _, leaf = path.rpartition(".")
            lent.append((block.get_submodule(module), leaf, view))
        return lent

    def _acquire(self, unit: int, phase: Phase) -> int:
        """The slot with the unit as it is now: what was written to its parameters, a merge say, is seen."""
        version = self._version(unit)
        if version != self._versions[unit]:
            self.streamer.forget(unit)
            self._versions[unit] = version
        return self.streamer.acquire(unit, phase)

    def _version(self, unit: int) -> int:
        return sum(parameter._version for parameter in self._parameters[unit])

    def _pack(self, tensor: Tensor) -> Tensor | _SlotView:
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        unit = None if slot is None else self.streamer.unit_in(slot)
        if unit is None:
            return tensor.detach()  # a node that holds its own output would never be freed
        return _SlotView(unit, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Tensor | _SlotView) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        slot = self.slots[self._acquire(packed.unit, Phase.BACKWARD)]
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


def _set_parameters(parameters: Sequence[_Lent]) -> None:
    for module, leaf, parameter in parameters:
        setattr(module, leaf, parameter)
