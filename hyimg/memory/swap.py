"""Block streaming: `--blocks_to_swap` keeps weights of blocks in host memory and copies them as they are needed.

The copies go to a ring of device buffers (slots). Only the weights of Linears, and with fp8 their scales, are
streamed: all but a thousandth of a block. Biases, norms and adapters stay on the device. While a block runs, its
parameters are views of a slot; otherwise they are the host copy, so that code which reads or writes the model's
parameters sees the only copy there is.

The backward pass needs the weights again. With checkpointing a block is run again there, which acquires its unit.
Without, autograd would keep views of a slot that has been refilled since, so it saves which part of which unit
it needs, and unpacking acquires that unit.

A slot is never read after it was refilled: blocks run one after another, and autograd runs the nodes of a later
block before those of an earlier one, so when a unit is acquired, nothing still uses the unit before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hyimg.checkpoints.architecture import DiTArch
from hyimg.errors import HyimgError
from hyimg.memory.host_memory import HostBuffer
from hyimg.memory.streaming import CopyEngine, CudaCopyEngine, Phase, Streamer, SynchronousCopyEngine
from hyimg.model.dit import DiT, RunBlock
from hyimg.model.layers import Linear

# As in the reference tool, so many blocks of each kind stay on the device
_RESIDENT = 2

NUM_SLOTS = 2
"""One unit computes while the next one arrives."""

# The names of the blocks that are copied together: (`double_blocks.3`,) or (`single_blocks.8`, `single_blocks.9`)
Unit = tuple[str, ...]


def streamed_units(arch: DiTArch, blocks_to_swap: int) -> list[Unit]:
    """The units of `--blocks_to_swap N`, in the order of the forward pass.

    The reference tool's split: N//2 double blocks and 2*(N - N//2) single blocks. Two neighbouring single blocks
    are nearly as large as a double block and form one unit, so that a ring of equal buffers wastes little. Units
    are spread evenly over the depth: the resident blocks between them give the next copy time.

    Raises HyimgError if N is more than the model's depth allows.
    """
    most = max_blocks_to_swap(arch)
    if blocks_to_swap > most:
        raise HyimgError(
            f"`--blocks_to_swap` {blocks_to_swap} is more than this model's {most}: of its {arch.num_double} "
            f"double and {arch.num_single} single blocks two of each stay on the device",
            hint=f"give at most {most}",
        )
    num_doubles = blocks_to_swap // 2
    num_pairs = blocks_to_swap - num_doubles
    doubles = [(f"double_blocks.{i * arch.num_double // num_doubles}",) for i in range(num_doubles)]
    starts = [2 * (i * (arch.num_single // 2) // num_pairs) for i in range(num_pairs)]
    return [*doubles, *((f"single_blocks.{i}", f"single_blocks.{i + 1}") for i in starts)]


def max_blocks_to_swap(arch: DiTArch) -> int:
    """The largest `--blocks_to_swap` that leaves two double and two single blocks on the device: 37 for 2.1."""
    most_doubles = arch.num_double - _RESIDENT
    most_pairs = (arch.num_single - _RESIDENT) // 2
    # N//2 doubles bound N from above by 2 * most_doubles + 1, N - N//2 pairs by 2 * most_pairs
    return max(0, min(2 * most_doubles + 1, 2 * most_pairs))


# A module, the name of its parameter, and the parameter that it has while a block runs
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
    """Streams the units through slots on `device`; `run` runs the model's blocks.

    The streamed weights of the DiT must be in host memory. They are moved into page-locked buffers, one for each
    unit, and the model's parameters become views of those. With `checkpointing`, `run` must be called inside a
    checkpoint, and `around_checkpoint` must wrap that.
    """

    def __init__(
        self,
        dit: DiT,
        units: Sequence[Unit],
        device: torch.device,
        *,
        checkpointing: bool = False,
        num_slots: int = NUM_SLOTS,
        make_engine: MakeEngine | None = None,
    ) -> None:
        assert units
        self.device = device
        self.checkpointing = checkpointing
        self._unit_of = {dit.get_submodule(name): unit for unit, names in enumerate(units) for name in names}
        self._parameters = [
            {
                f"{name}.{leaf}": dit.get_parameter(f"{name}.{leaf}")
                for name in names
                for leaf in streamed_parameters(dit.get_submodule(name))
            }
            for names in units
        ]
        is_cuda = device.type == "cuda"
        with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
            self.buffers = [HostBuffer(parameters, lock=is_cuda) for parameters in self._parameters]
        self._versions = [self._version(unit) for unit in range(len(units))]
        num_bytes = max(len(buffer.bytes) for buffer in self.buffers)
        num_slots = min(num_slots, len(units))
        self.slots = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        make_engine = make_engine or (CudaCopyEngine if is_cuda else SynchronousCopyEngine)
        self.engine = make_engine(self.slots, [buffer.bytes for buffer in self.buffers])
        self.streamer = Streamer(len(units), num_slots, self.engine)
        self._lent = {
            (dit.get_submodule(name), slot): self._lend(dit, name, unit, slot)
            for unit, names in enumerate(units)
            for name in names
            for slot in range(num_slots)
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
        """Calls a block; the weights of a streamed block are then in a slot."""
        unit = self._unit_of.get(block)
        if unit is None:
            return block(*args)
        if not torch.is_grad_enabled():
            return self._call(block, unit, Phase.FORWARD, args)
        if self.checkpointing:
            phase = Phase.FORWARD_WITH_GRADIENT if self._in_forward_pass else Phase.BACKWARD
            return self._call(block, unit, phase, args)
        # Not inside a checkpoint, from which these hooks would hide the block's activations
        with saved_tensors_hooks(self._pack, self._unpack):
            return self._call(block, unit, Phase.FORWARD_WITH_GRADIENT, args)

    def around_checkpoint(self, run: RunBlock) -> RunBlock:
        """Wraps a `run` that checkpoints: blocks that run before it returns run in the forward pass."""

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

    def _lend(self, dit: DiT, block: str, unit: int, slot: int) -> list[_Lent]:
        """The streamed parameters of a block as views of a slot.

        They are parameters of the same dtypes and shapes, so that the compiler sees no difference.
        """
        lent = []
        for path, field in self.buffers[unit].fields.items():
            if path.startswith(f"{block}."):
                module, _, leaf = path.rpartition(".")
                view = nn.Parameter(field.view(self.slots[slot]), requires_grad=False)
                lent.append((dit.get_submodule(module), leaf, view))
        return lent

    def _acquire(self, unit: int, phase: Phase) -> int:
        """The slot that holds the unit. Writes to its parameters since it was copied, by a merge say, are seen."""
        version = self._version(unit)
        if version != self._versions[unit]:
            self.streamer.forget(unit)
            self._versions[unit] = version
        return self.streamer.acquire(unit, phase)

    def _version(self, unit: int) -> int:
        return sum(parameter._version for parameter in self._parameters[unit].values())

    def _pack(self, tensor: Tensor) -> Tensor | _SlotView:
        data = tensor.untyped_storage().data_ptr()
        slots = (n for n, slot in enumerate(self.slots) if slot.untyped_storage().data_ptr() == data)
        slot = next(slots, None)
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
    """The names of a block's streamed parameters: the weights of its Linears, and their scales."""
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
