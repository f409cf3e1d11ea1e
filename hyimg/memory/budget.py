"""The memory that weights and images need, computed from the architecture before anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hyimg.checkpoints.architecture import SPATIAL_FACTOR, DiTArch, VAEArch
from hyimg.checkpoints.names import dit_shapes
from hyimg.errors import HyimgError
from hyimg.memory.fp8 import BLOCK_SIZE, is_quantised
from hyimg.memory.swap import NUM_SLOTS, streamed_units
from hyimg.report import size_text

_SCALE_BYTES = 4
_COLORS = 3

# Memory of a token while a block runs, as a multiple of a single block's widest products (q, k, v and MLP, and
# their results). An estimate on the safe side, not a measurement.
_TOKEN_WIDTHS = 3
# Tokens of the longest prompt, with quoted text
_MAX_TEXT_TOKENS = 1024 + 34 + 128
# The share of a device's memory that its driver, libraries and a desktop take
_RESERVED_SHARE = 0.15


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights on the device and in host memory. `ring`, the streaming buffers, is part of `device`."""

    device: int
    ring: int
    host: int


def weight_bytes(arch: DiTArch, *, blocks_to_swap: int, fp8: bool, bytes_per_value: int = 2) -> WeightBytes:
    """The weights of a DiT under these options; `bytes_per_value` is for weights that are not fp8 (2 for bf16).

    Activations, adapters and the optimiser are extra. Padding of streamed tensors is not counted.
    """
    names = streamed_units(arch, blocks_to_swap)
    unit_of = {block: number for number, unit in enumerate(names) for block in unit}
    units = [0] * len(names)
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
    """An estimate of the bytes that rendering one image needs in addition to the weights, without gradients."""
    num_tokens = width * height // SPATIAL_FACTOR**2 + _MAX_TEXT_TOKENS
    return _TOKEN_WIDTHS * num_tokens * (6 * arch.hidden + 2 * arch.mlp_hidden) * bytes_per_value


def least_rendering_bytes(arch: DiTArch, width: int, height: int, bytes_per_value: int = 2) -> int:
    """A lower bound of `activation_bytes`, to refuse impossible sizes: a block's input, q, k, v and MLP."""
    num_tokens = width * height // SPATIAL_FACTOR**2
    return num_tokens * (4 * arch.hidden + arch.mlp_hidden) * bytes_per_value


def least_decoding_bytes(
    arch: VAEArch, width: int, height: int, bytes_per_value: int = 2, *, in_tiles: bool = False
) -> int:
    """A lower bound for decoding one image: a convolution's input and output at full size.

    With tiles, the image in the VAE's dtype and in float32.
    """
    per_pixel = _COLORS * (bytes_per_value + 4) if in_tiles else 2 * arch.channels[0] * bytes_per_value
    return width * height * per_pixel


def require_room_for_images(
    sizes: Iterable[tuple[int, int]],
    needs: Mapping[str, Callable[[int, int], int]],
    *,
    device_name: str,
    memory: int,
    hints: Mapping[str, str],
) -> None:
    """Raises HyimgError for a (width, height) in pixels that cannot fit, naming the largest square that could.

    `needs` maps an activity ("rendering") to its bytes by size, `hints` to another way out.
    """
    for width, height in dict.fromkeys(sizes):
        for doing, bytes_for in needs.items():
            if bytes_for(width, height) > memory:
                side = _largest_side(lambda w, h: all(need(w, h) <= memory for need in needs.values()))
                ways = [hints.get(doing), f"at most {side}x{side} could fit" if side else None]
                raise HyimgError(
                    f"{doing} an image of {width}x{height} (width x height) needs at least "
                    f"{size_text(bytes_for(width, height))}, and {device_name} has {size_text(memory)}",
                    hint="; ".join(filter(None, ways)) or None,
                )


def _largest_side(fits: Callable[[int, int], bool]) -> int:
    """The side in pixels of the largest square that fits, a multiple of 32; 0 if none does."""
    low, high = 0, 1
    while fits(high * SPATIAL_FACTOR, high * SPATIAL_FACTOR):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * SPATIAL_FACTOR, middle * SPATIAL_FACTOR):
            low = middle
        else:
            high = middle
    return low * SPATIAL_FACTOR


def fits_twice(taken: WeightBytes, image_bytes: int, device_bytes: int) -> bool:
    """Whether the weights and two images of `image_bytes` fit on a device together."""
    return taken.device + 2 * image_bytes <= device_bytes * (1 - _RESERVED_SHARE)


def require_room(taken: WeightBytes, *, device_name: str, device_bytes: int, host_bytes: int) -> None:
    """Raises HyimgError if the weights alone exceed the memory of the device or the host."""
    if taken.device > device_bytes:
        raise HyimgError(
            f"the DiT's weights need {size_text(taken.device)} on {device_name}, which has {size_text(device_bytes)}",
            hint="use `--fp8_scaled`, or a higher `--blocks_to_swap` (see the table in docs/memory.md)",
        )
    if taken.host > host_bytes:
        raise HyimgError(
            f"{size_text(taken.host)} of weights would be in host memory, and this machine has "
            f"{size_text(host_bytes)}",
            hint="use `--fp8_scaled`, or a lower `--blocks_to_swap` (see the table in docs/memory.md)",
        )


def _fp8_bytes(shape: tuple[int, ...]) -> int:
    """One byte a value, and a float32 scale for each block of a row."""
    rows, columns = shape
    scales = rows * (columns // BLOCK_SIZE if columns % BLOCK_SIZE == 0 else 1)
    return rows * columns + _SCALE_BYTES * scales
