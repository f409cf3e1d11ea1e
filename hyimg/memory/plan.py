"""What the DiT's weights take, and where, by arithmetic on the architecture: known before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyimg.errors import HyimgError
from hyimg.memory.fp8 import BLOCK_SIZE, is_quantised
from hyimg.memory.swap import NUM_SLOTS
from hyimg.memory.swap_plan import SwapPlan
from hyimg.model.architecture import DiTArch
from hyimg.model.dit_shapes import dit_shapes
from hyimg.report import size_text

_SCALE_BYTES = 4


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights on the device, of which `ring` are buffers that streamed weights pass through, and in
    host memory."""

    device: int
    ring: int
    host: int


def weight_bytes(arch: DiTArch, *, blocks_to_swap: int, fp8: bool, bytes_per_value: int = 2) -> WeightBytes:
    """The weights of a DiT under these options; `bytes_per_value` is that of what is not fp8 (bf16: 2).

    Activations, adapters and the optimiser come on top of it. Paddings of streamed tensors are left out.
    """
    plan = SwapPlan.for_arch(arch, blocks_to_swap)
    unit_of = {block: number for number, unit in enumerate(plan.units) for block in unit}
    units = [0] * len(plan.units)
    device = 0
    for name, shape in dit_shapes(arch).items():
        size = math.prod(shape) * bytes_per_value
        if is_quantised(name):
            size = _fp8_bytes(shape) if fp8 else size
            unit = unit_of.get(".".join(name.split(".", 2)[:2]))
            if unit is not None:
                units[unit] += size
                continue
        device += size
    ring = min(NUM_SLOTS, len(units)) * max(units, default=0)
    return WeightBytes(device + ring, ring, sum(units))


def require_room(taken: WeightBytes, *, device_name: str, device_bytes: int, host_bytes: int) -> None:
    """Raises HyimgError where the weights alone are more than the device, or the host, has memory."""
    if taken.device > device_bytes:
        raise HyimgError(
            f"the DiT's weights take {size_text(taken.device)} on {device_name}, which has {size_text(device_bytes)}",
            hint="give `--fp8_scaled`, or more `--blocks_to_swap` (docs/memory.md has a table)",
        )
    if taken.host > host_bytes:
        raise HyimgError(
            f"{size_text(taken.host)} of weights would be in host memory, and this machine has "
            f"{size_text(host_bytes)}",
            hint="give `--fp8_scaled`, or fewer `--blocks_to_swap` (docs/memory.md has a table)",
        )


def _fp8_bytes(shape: tuple[int, ...]) -> int:
    """A value is one byte, and so many of them share a scale."""
    rows, columns = shape
    scales = rows * (columns // BLOCK_SIZE if columns % BLOCK_SIZE == 0 else 1)
    return rows * columns + _SCALE_BYTES * scales
