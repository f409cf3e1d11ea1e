"""The DiT as the memory options want it: checked against its header, loaded, and with a way to run its blocks.

    options = DiTOptions.of(config.memory, config.training_memory)
    options.check(path, device, dtype)                  # before anything is read
    dit = options.load(path, device, dtype, report=report)

How a block is run, from the inside out: compiled, its weights streamed, recomputed in the backward pass, the
inputs that this keeps offloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from hyimg.config.models import Memory, TrainingMemory
from hyimg.errors import HyimgError
from hyimg.memory.activations import CheckpointOptions, checkpointed
from hyimg.memory.compilation import compile_blocks, require_compiler
from hyimg.memory.fp8 import require_fp8_device
from hyimg.memory.host_memory import UNLOCKED_WARNING
from hyimg.memory.placement import DiTPlacement
from hyimg.memory.plan import WeightBytes, activation_bytes, fits_twice, require_room, weight_bytes
from hyimg.memory.swap import BlockSwap
from hyimg.memory.swap_plan import SwapPlan, check_blocks_to_swap
from hyimg.model.architecture import DiTArch
from hyimg.model.attention import resolve_attention
from hyimg.model.dit import DiT, run_plainly
from hyimg.model.header_check import Contents, read_dit
from hyimg.model.loading import Placement, load_dit
from hyimg.model.safetensors_file import Checkpoint
from hyimg.report import Reporter, size_text


@dataclass(frozen=True, kw_only=True)
class DiTOptions:
    """How a DiT is held and run; the fields are the options of those names."""

    attn_mode: str = "torch"
    split_attn: bool = False
    fp8_scaled: bool = False
    blocks_to_swap: int = 0
    torch_compile: bool = False
    checkpointing: CheckpointOptions = field(default_factory=CheckpointOptions)
    training: bool = False

    @staticmethod
    def of(memory: Memory, training: TrainingMemory | None = None) -> DiTOptions:
        """From a command's options; `training` None is rendering."""
        checkpointing = CheckpointOptions()
        if training is not None:
            checkpointing = CheckpointOptions(
                enabled=training.gradient_checkpointing,
                keep_attention=training.checkpoint_keep == "attention",
                offload=training.cpu_offload_checkpointing,
            )
        return DiTOptions(
            attn_mode=memory.attn_mode,
            split_attn=training is not None and training.split_attn,
            fp8_scaled=memory.fp8_scaled,
            blocks_to_swap=memory.blocks_to_swap,
            torch_compile=memory.torch_compile,
            checkpointing=checkpointing,
            training=training is not None,
        )

    def check(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Finds what cannot be, from the checkpoint's header and this machine; raises HyimgError."""
        contents = read_dit(Checkpoint.open(path))
        check_blocks_to_swap(contents.arch, self.blocks_to_swap)
        if self.blocks_to_swap and device.type == "mps":
            raise HyimgError(
                "`--blocks_to_swap` saves nothing on Apple's MPS, whose memory is the host's",
                hint="leave the option out",
            )
        if self.fp8_scaled and contents.quantization is not None:
            raise HyimgError(
                f"`{path}` is fp8 already ({contents.quantization}), and `--fp8_scaled` would quantise it again",
                hint="leave `--fp8_scaled` out: the file's weights stay fp8",
            )
        if self.fp8_scaled or contents.quantization is not None:
            require_fp8_device(device)
        resolve_attention(
            self.attn_mode, split=self.split_attn, device=device, dtype=dtype, training=self.training
        )
        if self.torch_compile:
            require_compiler(device)
        if device.type == "cuda":
            require_room(
                self._weight_bytes(contents, device, dtype),
                device_name=str(device),
                device_bytes=torch.cuda.get_device_properties(device).total_memory,
                host_bytes=psutil.virtual_memory().total,
            )

    def describe(self, path: Path, device: torch.device, dtype: torch.dtype) -> str:
        """What the weights will take and where, for a note before they are loaded; from the header alone."""
        taken = self._weight_bytes(read_dit(Checkpoint.open(path)), device, dtype)
        text = f"weights: {size_text(taken.device)} on {device}"
        if taken.host:
            text += f" ({size_text(taken.ring)} of it for streaming), {size_text(taken.host)} in host memory"
        return text

    def has_room_for_two(
        self, path: Path, device: torch.device, dtype: torch.dtype, width: int, height: int
    ) -> bool:
        """Whether two images of so many pixels can be computed at a time: on a GPU, whose memory is known."""
        if device.type != "cuda":
            return False
        contents = read_dit(Checkpoint.open(path))
        return fits_twice(
            self._weight_bytes(contents, device, dtype),
            activation_bytes(contents.arch, width, height, dtype.itemsize),
            torch.cuda.get_device_properties(device).total_memory,
        )

    def _weight_bytes(
        self, contents: Contents[DiTArch], device: torch.device, dtype: torch.dtype
    ) -> WeightBytes:
        return weight_bytes(
            contents.arch,
            blocks_to_swap=self.blocks_to_swap if device.type == "cuda" else 0,
            fp8=self.fp8_scaled or contents.quantization is not None,
            bytes_per_value=dtype.itemsize,
        )

    def load(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        report: Reporter,
        *,
        mmap: bool = True,
        around: Callable[[Placement], Placement] = lambda placement: placement,
    ) -> DiT:
        """The frozen DiT, ready to run; what was chosen is noted. Raises as `load_dit`.

        `around` may put another placement before the one that quantises and streams.
        """
        arch = read_dit(Checkpoint.open(path)).arch
        plan = SwapPlan.for_arch(arch, self.blocks_to_swap)
        placement = DiTPlacement(device, dtype, plan=plan, fp8=self.fp8_scaled)
        dit = load_dit(path, placement=around(placement), mmap=mmap)
        if self.fp8_scaled:
            report.note(placement.errors.summary())
        dit.attention = resolve_attention(
            self.attn_mode, split=self.split_attn, device=device, dtype=dtype, training=self.training
        )
        if self.attn_mode != "torch" or self.split_attn:
            report.note(f"attention: {dit.attention.name}")
        swap = None
        if plan.units:
            swap = BlockSwap(dit, plan, device, checkpointing=self.checkpointing.active)
            _tell_streaming(swap, plan, report)
        self.install(dit, swap)
        return dit

    def install(self, dit: DiT, swap: BlockSwap | None = None) -> None:
        """Gives a DiT its way to run blocks."""
        if self.torch_compile:
            compile_blocks(dit)
        run = run_plainly if swap is None else swap.run
        run = checkpointed(run, self.checkpointing, dit.device)
        dit.run_block = swap.around_checkpoint(run) if swap and self.checkpointing.active else run


def _tell_streaming(swap: BlockSwap, plan: SwapPlan, report: Reporter) -> None:
    if swap.device.type != "cuda":
        report.note(
            f"note: `--blocks_to_swap` saves nothing on the {swap.device.type}, whose memory is the host's"
        )
        return
    report.note(
        f"streaming: {len(plan.blocks)} blocks in {size_text(swap.host_bytes)} of host memory, through "
        f"{size_text(swap.ring_bytes)} on the device"
    )
    if not swap.is_locked:
        report.warning(UNLOCKED_WARNING)
