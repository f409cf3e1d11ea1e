"""The DiT with the memory options: checked against its header, loaded, and with a way to run its blocks.

    setup = DiTSetup(open_dit(path), config.memory, device, dtype, config.training_memory)
    setup.check()                   # before a weight is read
    dit = setup.load(report)

What wraps a block's run, from the inside out: compilation, streaming, recomputation in the backward pass, offloading
of the inputs that recomputation keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.header_check import OpenedModel
from hyimg.config.models import Memory, TrainingMemory
from hyimg.errors import HyimgError
from hyimg.memory.budget import (
    WeightBytes,
    activation_bytes,
    fits_twice,
    least_rendering_bytes,
    require_room,
    weight_bytes,
)
from hyimg.memory.checkpointing import checkpointed
from hyimg.memory.compilation import compile_blocks, require_compiler
from hyimg.memory.device import SHARES_HOST_MEMORY, total_memory
from hyimg.memory.fp8 import E4M3, QuantizationErrors, is_quantised, put_scaled, quantize, require_fp8_device
from hyimg.memory.host_memory import UNLOCKED_WARNING
from hyimg.memory.swap import BlockSwap, Unit, streamed_units
from hyimg.model.attention import AttentionBackend, resolve_attention
from hyimg.model.dit import DiT, RunBlock, run_block
from hyimg.model.loading import WeightPlacement, load_dit
from hyimg.report import Reporter, size_text

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class DiTSetup:
    """An opened DiT checkpoint and how it is held and run; `training` None is rendering."""

    opened: OpenedModel[DiTArch]
    memory: Memory
    device: torch.device
    dtype: torch.dtype
    training: TrainingMemory | None = None

    @property
    def is_fp8_file(self) -> bool:
        """Whether the file's weights are fp8."""
        return self.opened.quantization is not None

    def check(self) -> None:
        """Raises HyimgError for options that this checkpoint or this machine rules out."""
        memory, path = self.memory, self.opened.path
        streamed_units(self.opened.arch, memory.blocks_to_swap)
        if memory.blocks_to_swap and self.device.type == "mps":
            raise HyimgError(
                "`--blocks_to_swap` saves nothing on Apple's MPS, which shares the host's memory",
                hint="remove the option",
            )
        if memory.fp8_scaled and self.is_fp8_file:
            raise HyimgError(
                f"`{path}` is already fp8 ({self.opened.quantization}), and `--fp8_scaled` would quantise it again",
                hint="remove `--fp8_scaled`: the file's weights stay fp8",
            )
        if memory.fp8_scaled or self.is_fp8_file:
            require_fp8_device(self.device)
        self._attention()
        if memory.torch_compile:
            require_compiler(self.device)
        device_bytes = total_memory(self.device)
        if device_bytes is not None:
            require_room(
                self._weight_bytes(),
                device_name=str(self.device),
                device_bytes=device_bytes,
                host_bytes=psutil.virtual_memory().total,
            )

    def describe(self) -> str:
        """The memory that the weights will need, in one line."""
        taken = self._weight_bytes()
        text = f"weights: {size_text(taken.device)} on {self.device}"
        if taken.host:
            text += (
                f" ({size_text(taken.ring)} of it streaming buffers), {size_text(taken.host)} in host memory"
            )
        return text

    def has_room_for_two(self, width: int, height: int) -> bool:
        """Whether two images of this size in pixels fit on the device together; False if its memory is not known."""
        memory = total_memory(self.device)
        if memory is None:
            return False
        image_bytes = activation_bytes(self.opened.arch, width, height, self.dtype.itemsize)
        return fits_twice(self._weight_bytes(), image_bytes, memory)

    def least_bytes(self, width: int, height: int) -> int:
        """A lower bound of the memory that rendering an image needs, with the weights that are on the device."""
        # On the CPU, part of the weights may stay in the file
        weights = 0 if self.device.type in SHARES_HOST_MEMORY else self._weight_bytes().device
        return weights + least_rendering_bytes(self.opened.arch, width, height, self.dtype.itemsize)

    def load(
        self,
        report: Reporter,
        *,
        around: Callable[[WeightPlacement], WeightPlacement] = lambda placement: placement,
    ) -> DiT:
        """The frozen DiT, ready to run; notes what was chosen. Raises as `load_dit`.

        `around` may wrap the placement that quantises and streams, to merge LoRAs into the weights.
        """
        memory = self.memory
        units = streamed_units(self.opened.arch, memory.blocks_to_swap)
        placement = DiTPlacement(self.device, self.dtype, units=units, fp8=memory.fp8_scaled)
        dit = load_dit(self.opened, placement=around(placement))
        if memory.fp8_scaled:
            report.note(placement.errors.summary())
        dit.attention = self._attention()
        if dit.attention.name != "torch":
            report.note(f"attention: {dit.attention.name}")
        training = self.training or TrainingMemory()
        swap = None
        if units:
            swap = BlockSwap(dit, units, self.device, checkpointing=training.checkpoints_blocks)
            _note_streaming(swap, sum(map(len, units)), report)
        install_run_block(dit, training, swap, torch_compile=memory.torch_compile)
        return dit

    def _attention(self) -> AttentionBackend:
        return resolve_attention(
            self.memory.attn_mode,
            split=self.training is not None and self.training.split_attn,
            device=self.device,
            dtype=self.dtype,
            training=self.training is not None,
        )

    def _weight_bytes(self) -> WeightBytes:
        return weight_bytes(
            self.opened.arch,
            blocks_to_swap=0 if self.device.type in SHARES_HOST_MEMORY else self.memory.blocks_to_swap,
            fp8=self.memory.fp8_scaled or self.is_fp8_file,
            bytes_per_value=self.dtype.itemsize,
        )


def install_run_block(
    dit: DiT, training: TrainingMemory, swap: BlockSwap | None, *, torch_compile: bool = False
) -> None:
    """Makes a DiT run its blocks compiled, streamed, and checkpointed as `training` says."""
    if torch_compile:
        compile_blocks(dit)
    run: RunBlock = checkpointed(run_block if swap is None else swap.run, training, dit.device)
    dit.run_block = swap.around_checkpoint(run) if swap and training.checkpoints_blocks else run


class DiTPlacement(WeightPlacement):
    """Puts the weights of streamed blocks into host memory and all others on the device, tensor by tensor.

    With `fp8` the blocks' weights are quantised as they are read, on the device, so that the model is never
    there in full precision; `errors` collects what that costs. Weights that are e4m3 in the file stay e4m3.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, units: Sequence[Unit] = (), fp8: bool = False
    ) -> None:
        super().__init__(device, dtype)
        self.compute_dtype = dtype
        self.fp8 = fp8
        self.errors = QuantizationErrors()
        self._streamed_blocks = {block for unit in units for block in unit}

    def read_on(self, name: str) -> torch.device:
        is_for_device = self.fp8 and is_quantised(name)
        return self.device if is_for_device else self._home(name)

    def put(self, model: nn.Module, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
        home = self._home(name)
        if tensor.dtype == E4M3 and is_quantised(name):
            put_scaled(model, name, tensor.to(home), (torch.ones(1) if scale is None else scale).to(home))
        elif self.fp8 and is_quantised(name):
            weight_OI = tensor.to(self.compute_dtype)
            q_OI, scale = quantize(weight_OI)
            self.errors.add(name, weight_OI, q_OI, scale)
            put_scaled(model, name, q_OI.to(home), scale.to(home))
        else:
            WeightPlacement(home, self.compute_dtype).put(model, name, tensor, scale)

    def _home(self, name: str) -> torch.device:
        """Where a tensor stays: on the host if it is streamed."""
        block = ".".join(name.split(".", 2)[:2])
        is_streamed = block in self._streamed_blocks and is_quantised(name)
        return _HOST if is_streamed else self.device


def _note_streaming(swap: BlockSwap, num_blocks: int, report: Reporter) -> None:
    device = swap.device.type
    if device in SHARES_HOST_MEMORY:
        report.note(f"note: `--blocks_to_swap` saves nothing on the {device}, which shares the host's memory")
        return
    report.note(
        f"streaming: {num_blocks} blocks in {size_text(swap.host_bytes)} of host memory, through "
        f"{size_text(swap.ring_bytes)} on the device"
    )
    if device != "cuda":
        report.note(f"note: on `{device}` computation waits for each block to arrive")
    elif not swap.is_locked:
        report.warning(UNLOCKED_WARNING)
