"""Runs a stage of the VAE in overlapping tiles, with the same result as without tiles.

The usual tiling, which runs the entire VAE on each tile and blends the results, changes the image: GroupNorm uses the
statistics of a tile, and attention sees only that tile. Here each GroupNorm uses the statistics of the full image,
which are measured first: for one norm after the other, all tiles are run up to that norm. Tiles overlap by the
receptive radius of the stage's convolutions, and only their cores, which the cut does not affect, are used. So the
result needs no blending, and differs only by the rounding of the kernels.

This costs time: a stage with k norms is run about k/2 + 1 times, including margins.
Shapes: B batch, C channels, H W size, G groups of channels, K channels of a group
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]


class Statistics(NamedTuple):
    """Mean and variance of an image's groups of channels, float32 (B, G)."""

    mean_BG: Tensor
    variance_BG: Tensor


class GroupNorm(nn.GroupNorm):
    """A group norm that uses given `statistics`, if set, for an input that is a tile."""

    statistics: Statistics | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.statistics is None:
            return super().forward(input)
        mean_BG, variance_BG = self.statistics
        weight_GK = self.weight.float().view(self.num_groups, -1)
        scale_BGK = torch.rsqrt(variance_BG + self.eps)[..., None] * weight_GK
        shift_BGK = self.bias.float().view(self.num_groups, -1) - mean_BG[..., None] * scale_BGK
        scale_BC11, shift_BC11 = (x.flatten(1)[..., None, None] for x in (scale_BGK, shift_BGK))
        # float32 inside, like torch's kernel
        return torch.addcmul(shift_BC11, input.float(), scale_BC11).to(input.dtype)


@dataclass(frozen=True)
class Tile:
    """A tile's place in the input (`rows`, `columns`), and its core: the part whose results are used."""

    rows: slice
    columns: slice
    core_rows: slice
    core_columns: slice

    def of(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW[..., self.rows, self.columns]

    def scale_of(self, tile_BCHW: Tensor) -> float:
        """The size of a tensor computed from the tile, relative to the tile."""
        width: int = self.columns.stop - self.columns.start
        return tile_BCHW.shape[-1] / width

    def core_of(self, tile_BCHW: Tensor) -> Tensor:
        """The core of a tensor computed from the tile."""
        scale = self.scale_of(tile_BCHW)
        rows = _scaled(self.core_rows, scale, origin=self.rows.start)
        columns = _scaled(self.core_columns, scale, origin=self.columns.start)
        return tile_BCHW[..., rows, columns]


def run_in_tiles(layers: Sequence[Layer], x_BCHW: Tensor, *, side: int, margin: int) -> Tensor:
    """Runs `layers` in sequence on tiles of at most `side` x `side` values of the input (B, C, H, W).

    `margin`, even, is their receptive radius; the result may have half, once or twice the input's size. An input that
    fits in one tile is run at once. Without gradients only.
    """
    height, width = x_BCHW.shape[-2:]
    if max(height, width) <= side:
        return run(layers, x_BCHW)
    tiles = list(cut(height, width, side=side, margin=margin))
    norms = [module for module in modules_of(layers) if isinstance(module, GroupNorm)]
    try:
        for norm in norms:
            norm.statistics = _measure(norm, layers, x_BCHW, tiles)
        return _assemble(layers, x_BCHW, tiles)
    finally:
        for norm in norms:
            norm.statistics = None


def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """Runs `layers` in sequence."""
    for layer in layers:
        x = layer(x)
    return x


def modules_of(layers: Sequence[Layer]) -> list[nn.Module]:
    """All modules in `layers`, in the order in which they run."""
    return [module for layer in layers if isinstance(layer, nn.Module) for module in layer.modules()]


def cut(height: int, width: int, *, side: int, margin: int) -> Iterator[Tile]:
    """The fewest tiles with sides of at most `side`, including margins; their cores partition the input."""
    for rows, core_rows in _spans(height, side, margin):
        for columns, core_columns in _spans(width, side, margin):
            yield Tile(rows, columns, core_rows, core_columns)


def _spans(length: int, side: int, margin: int) -> list[tuple[slice, slice]]:
    """(tile, core) along an axis; cores have similar lengths, and start at even positions, as halving needs."""
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    core = side - 2 * margin
    assert core >= 2, "a tile is larger than its margins"
    count = -(-length // (core // 2 * 2))
    bounds = [-(-i * length // (2 * count)) * 2 for i in range(count)] + [length]
    return [
        (slice(max(0, start - margin), min(length, end + margin)), slice(start, end))
        for start, end in pairwise(bounds)
    ]


def _assemble(layers: Sequence[Layer], x_BCHW: Tensor, tiles: Sequence[Tile]) -> Tensor:
    out_BCHW: Tensor | None = None
    for tile in tiles:
        result_BCHW = run(layers, tile.of(x_BCHW))
        scale = tile.scale_of(result_BCHW)
        if out_BCHW is None:
            size = [round(length * scale) for length in x_BCHW.shape[-2:]]
            out_BCHW = result_BCHW.new_empty(*result_BCHW.shape[:2], *size)
        place = (..., _scaled(tile.core_rows, scale), _scaled(tile.core_columns, scale))
        out_BCHW[place] = tile.core_of(result_BCHW)
        del result_BCHW  # before the next tile needs its memory
    assert out_BCHW is not None
    return out_BCHW


def _scaled(span: slice, scale: float, *, origin: int = 0) -> slice:
    return slice(round((span.start - origin) * scale), round((span.stop - origin) * scale))


class _Reached(Exception):  # noqa: N818 (control flow, not an error)
    """Stops a tile at the norm that is being measured, and carries that norm's input."""


def _measure(norm: GroupNorm, layers: Sequence[Layer], x_BCHW: Tensor, tiles: Sequence[Tile]) -> Statistics:
    """The statistics of the input of `norm`, from the cores of all tiles."""

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _Reached(arguments[0])

    handle = norm.register_forward_pre_hook(stop)
    try:
        return _pooled([_part(norm, layers, x_BCHW, tile) for tile in tiles])
    finally:
        handle.remove()


class _Part(NamedTuple):
    """The statistics of a tile's core, each of `num_values`."""

    num_values: int
    mean_BG: Tensor
    variance_BG: Tensor


def _part(norm: GroupNorm, layers: Sequence[Layer], x_BCHW: Tensor, tile: Tile) -> _Part:
    try:
        run(layers, tile.of(x_BCHW))
    except _Reached as reached:
        core_BCHW = tile.core_of(reached.args[0])
    values_BGN = core_BCHW.reshape(len(core_BCHW), norm.num_groups, -1).float()
    variance_BG, mean_BG = torch.var_mean(values_BGN, dim=-1, correction=0)
    return _Part(values_BGN.shape[-1], mean_BG, variance_BG)


def _pooled(parts: Sequence[_Part]) -> Statistics:
    """Combines the statistics of parts."""
    total = sum(part.num_values for part in parts)
    weights = [part.num_values / total for part in parts]
    mean_BG = torch.stack([part.mean_BG * w for part, w in zip(parts, weights, strict=True)]).sum(dim=0)
    squares = [part.variance_BG + (part.mean_BG - mean_BG) ** 2 for part in parts]
    return Statistics(
        mean_BG, torch.stack([square * w for square, w in zip(squares, weights, strict=True)]).sum(dim=0)
    )
