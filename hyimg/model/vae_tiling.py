"""A stage of the VAE in overlapping tiles, with the numbers of the whole picture.

The usual way, tiles that go through the whole VAE one by one and are blended, makes another picture: each
tile's GroupNorms take the statistics of the tile, and its attention sees no more. Here tiles take the whole
picture's statistics, which are gathered first: for one norm after the other, all tiles are run as far as that
norm. Tiles overlap by as much as the stage's convolutions look aside, and of each only the core is kept, which the
cut did not reach. So neighbours agree where they meet, nothing needs to be blended, and the result is that of the
whole but for the rounding of the kernels.

The price is time: a stage of k norms is run about k/2 + 1 times, margins included.
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
    """Mean and variance of a picture's groups of channels, float32 (B, G)."""

    mean_BG: Tensor
    variance_BG: Tensor


class GroupNorm(nn.GroupNorm):
    """A group norm that takes `statistics` from outside where its input is a tile of what they were measured on."""

    statistics: Statistics | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.statistics is None:
            return super().forward(input)
        mean_BG, variance_BG = self.statistics
        weight_GK = self.weight.float().view(self.num_groups, -1)
        scale_BGK = torch.rsqrt(variance_BG + self.eps)[..., None] * weight_GK
        shift_BGK = self.bias.float().view(self.num_groups, -1) - mean_BG[..., None] * scale_BGK
        scale_BC11, shift_BC11 = (x.flatten(1)[..., None, None] for x in (scale_BGK, shift_BGK))
        # float32 inside, as torch's own kernel
        return torch.addcmul(shift_BC11, input.float(), scale_BC11).to(input.dtype)


@dataclass(frozen=True)
class Tile:
    """Where a tile lies in the input (`rows`, `columns`), and its core: the part whose results are kept."""

    rows: slice
    columns: slice
    core_rows: slice
    core_columns: slice

    def of(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW[..., self.rows, self.columns]

    def scale_of(self, tile_BCHW: Tensor) -> float:
        """The size of a tensor that was made of the tile, against the tile's."""
        width: int = self.columns.stop - self.columns.start
        return tile_BCHW.shape[-1] / width

    def core_of(self, tile_BCHW: Tensor) -> Tensor:
        """The core's part of a tensor that was made of the tile."""
        scale = self.scale_of(tile_BCHW)
        rows = _scaled(self.core_rows, scale, origin=self.rows.start)
        columns = _scaled(self.core_columns, scale, origin=self.columns.start)
        return tile_BCHW[..., rows, columns]


def run_in_tiles(layers: Sequence[Layer], x_BCHW: Tensor, *, side: int, margin: int) -> Tensor:
    """`layers` one after another, applied to tiles of at most `side` x `side` values of the input.

    `margin` is how far a result may look in the input, and even; results may be half, once or twice the input's
    size. What fits in one tile is run whole. For use without gradients.
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
    """`layers` one after another."""
    for layer in layers:
        x = layer(x)
    return x


def modules_of(layers: Sequence[Layer]) -> list[nn.Module]:
    """All modules in `layers`, in the order in which they act."""
    return [module for layer in layers if isinstance(layer, nn.Module) for module in layer.modules()]


def cut(height: int, width: int, *, side: int, margin: int) -> Iterator[Tile]:
    """As few tiles as have sides of at most `side`, margins included; their cores cover each place once."""
    for rows, core_rows in _spans(height, side, margin):
        for columns, core_columns in _spans(width, side, margin):
            yield Tile(rows, columns, core_rows, core_columns)


def _spans(length: int, side: int, margin: int) -> list[tuple[slice, slice]]:
    """(tile, core) along an axis; cores are of about one length, and begin at even places as halving needs."""
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
    whole_BCHW: Tensor | None = None
    for tile in tiles:
        result_BCHW = run(layers, tile.of(x_BCHW))
        scale = tile.scale_of(result_BCHW)
        if whole_BCHW is None:
            size = [round(length * scale) for length in x_BCHW.shape[-2:]]
            whole_BCHW = result_BCHW.new_empty(*result_BCHW.shape[:2], *size)
        place = (..., _scaled(tile.core_rows, scale), _scaled(tile.core_columns, scale))
        whole_BCHW[place] = tile.core_of(result_BCHW)
        del result_BCHW  # before the next tile needs its memory
    assert whole_BCHW is not None
    return whole_BCHW


def _scaled(span: slice, scale: float, *, origin: int = 0) -> slice:
    return slice(round((span.start - origin) * scale), round((span.stop - origin) * scale))


class _Reached(Exception):  # noqa: N818 (it ends a way, and no error is meant)
    """Ends a tile's way at the norm that is being measured, whose input it carries."""


def _measure(norm: GroupNorm, layers: Sequence[Layer], x_BCHW: Tensor, tiles: Sequence[Tile]) -> Statistics:
    """The statistics of what `norm` is given, from the cores of all tiles."""

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
    """Statistics of the whole from those of its parts."""
    total = sum(part.num_values for part in parts)
    weights = [part.num_values / total for part in parts]
    mean_BG = torch.stack([part.mean_BG * w for part, w in zip(parts, weights, strict=True)]).sum(dim=0)
    squares = [part.variance_BG + (part.mean_BG - mean_BG) ** 2 for part in parts]
    return Statistics(
        mean_BG, torch.stack([square * w for square, w in zip(squares, weights, strict=True)]).sum(dim=0)
    )
