"""What the DiT's weights take, and where, by arithmetic on the architecture: known before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyimg.errors import HyimgError
from hyimg.memory.fp8 import BLOCK_SIZE, is_quantised
from hyimg.memory.swap import NUM_SLOTS
from hyimg.memory.swap_plan import SwapPlan
from hyimg.model.architecture import SPATIAL_FACTOR, DiTArch
from hyimg.model.dit_shapes import dit_shapes
from hyimg.report import size_text

_SCALE_BYTES = 4

# What a token takes while a block runs, in times of the widest products of a single block (q, k, v and MLP, and what
# they are made into). An estimate on the safe side, not a measurement.
_TOKEN_WIDTHS = 3
# Tokens of the longest prompt with its quoted texts
_MAX_TEXT_TOKENS = 1024 + 34 + 128
# Of a device's memory, what its driver, libraries and a desktop take
_RESERVED_SHARE = 0.15


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


def activation_bytes(arch: DiTArch, width: int, height: int, bytes_per_value: int = 2) -> int:
    """About what rendering one image of so many pixels takes beside the weights; no gradients."""
    num_tokens = width * height // SPATIAL_FACTOR**2 + _MAX_TEXT_TOKENS
    return _TOKEN_WIDTHS * num_tokens * (6 * arch.hidden + 2 * arch.mlp_hidden) * bytes_per_value


def fits_twice(taken: WeightBytes, image_bytes: int, device_bytes: int) -> bool:
    """Whether a device has room for the weights and two images of `image_bytes` at a time."""
    return taken.device + 2 * image_bytes <= device_bytes * (1 - _RESERVED_SHARE)


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
