"""A LoRA's contents as the tensors of another format: renamed, split by rows, fused, or scaled.

Names and row ranges are changed without looking at a value: the bytes are copied as they stand. Values are
computed (in float64, with numpy) only where a scale must be folded into `up`, because the target has no
alpha, or where adapters of several row ranges become one.

    split   up's rows are cut; every part shares down                                     rank stays
    fuse    parts that share down and scale: up's rows are stacked                        rank stays
            else down is stacked and up becomes block-structured, a block for each part   ranks add up

Either way a module's delta, alpha/rank * up @ down, stays what it is. A folded scale keeps it to float32
rounding: half precision is widened where the product would not be exact.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hyimg.errors import HyimgError
from hyimg.lora.contents import AdaptedModule, LoRAContents, Piece
from hyimg.lora.formats import Format
from hyimg.lora.values import encode, read_values, same_bytes, widened
from hyimg.lora.writer import OutputTensor, stored_chunks
from hyimg.model.safetensors_file import DTYPES

if TYPE_CHECKING:
    from hyimg.lora.values import Values


def rewrite(contents: LoRAContents, format: Format, *, plain: bool = False) -> list[OutputTensor]:
    """The tensors of `contents` in `format`, ready to be written; their bytes are read then.

    `plain` refuses the tensors of LoHa and LoKr even where the format could carry them.

    Raises `HyimgError` where the format cannot hold a module's adapter.
    """
    outputs: list[OutputTensor] = []
    for module in contents.modules:
        outputs += _Rewriter(contents, format, module, plain).outputs()
    return outputs


class _Rewriter:
    """One module's way from the file to the target format."""

    def __init__(self, contents: LoRAContents, format: Format, module: AdaptedModule, plain: bool) -> None:
        self.contents, self.format, self.module, self.plain = contents, format, module, plain
        self.num_parts = len(module.target.diffusers)

    def outputs(self) -> Iterator[OutputTensor]:
        pieces = self.module.pieces
        splits = self.format.spelling == "diffusers" and self.num_parts > 1
        self._check_extras(splits)
        if splits and self.module.is_whole:
            yield from self._split(pieces[0])
        elif splits or self.module.is_whole:
            for piece in pieces:
                yield from self._carry(piece)
        elif self._share_down_and_scale(pieces):
            yield from self._stack(pieces)
        else:
            yield from self._fuse(pieces)

    def _check_extras(self, splits: bool) -> None:
        carried = self.format.has_extras and self.module.is_whole and not splits
        extras = [
            key
            for piece in self.module.pieces
            for role, key in piece.keys.items()
            if _is_extra(role) and not (carried and (role == "dora_scale" or not self.plain))
        ]
        if extras:
            what = "LoRA" if self.plain else self.format.title
            raise HyimgError(
                f"`{extras[0]}` in `{self.contents.path}` belongs to a DoRA, LoHa or LoKr, which {what} "
                "cannot hold",
                hint="only the reference tool's and ComfyUI's forms carry it, one into the other",
            )

    def _carry(self, piece: Piece) -> Iterator[OutputTensor]:
        """An adapter under new names; its scale moves between alpha and up where the formats ask for it."""
        for role, key in piece.keys.items():
            if role == "up":
                yield from self._scaled_up(piece, piece.part or 0, 0, self.contents.shape(key)[0])
            elif role != "alpha" or self.format.has_alpha:
                yield self._copy(role, [key], part=piece.part or 0)
        if self.format.has_alpha and "alpha" not in piece.keys and "up" in piece.keys:
            yield self._alpha(self._scale(piece) * self._rank(piece), part=piece.part or 0)

    def _split(self, piece: Piece) -> Iterator[OutputTensor]:
        """One adapter for each row range of a fused weight."""
        start = 0
        for part, width in enumerate(self.module.target.part_widths):
            end = start + self.contents.width(width)
            yield self._copy("down", [piece.keys["down"]], part=part)
            yield from self._scaled_up(piece, part, start, end)
            start = end

    def _share_down_and_scale(self, pieces: Sequence[Piece]) -> bool:
        """Whether the adapters of all row ranges are one adapter that was split."""
        first = pieces[0]
        if len(pieces) < self.num_parts or any(self._scale(piece) != self._scale(first) for piece in pieces):
            return False
        if len({self.contents.header.tensors[piece.keys["up"]].dtype for piece in pieces}) > 1:
            return False
        return all(
            same_bytes(self.contents.header, first.keys["down"], piece.keys["down"]) for piece in pieces[1:]
        )

    def _stack(self, pieces: Sequence[Piece]) -> Iterator[OutputTensor]:
        """Adapters that share down: one whose up has all their rows."""
        yield self._copy("down", [pieces[0].keys["down"]])
        scale = self._scale(pieces[0])
        ups = [piece.keys["up"] for piece in pieces]
        if self.format.has_alpha:
            yield self._copy("up", ups)
            yield self._alpha(scale * self._rank(pieces[0]))
        elif scale == 1:
            yield self._copy("up", ups)
        else:
            dtype = widened(self._dtype(ups[0]), scale)
            rows = sum(self.contents.shape(key)[0] for key in ups)
            yield self._computed("up", rows, self._rank(pieces[0]), dtype, partial(self._stacked, ups, scale))

    def _fuse(self, pieces: Sequence[Piece]) -> Iterator[OutputTensor]:
        """Unequal adapters: one of the summed rank. Row ranges that have none are rows of zeros in up."""
        downs, ups = [p.keys["down"] for p in pieces], [p.keys["up"] for p in pieces]
        rank = sum(self._rank(piece) for piece in pieces)
        if len({self._dtype(key) for key in downs}) == 1:
            yield self._copy("down", downs)
        else:
            columns = self.contents.shape(downs[0])[1]
            yield self._computed("down", rank, columns, "F32", partial(self._stacked, downs, 1.0))
        dtypes = {widened(self._dtype(key), self._scale(p)) for key, p in zip(ups, pieces, strict=True)}
        rows = self.contents.width(self.module.target.out_width)
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        yield self._computed("up", rows, rank, dtype, partial(self._block_structured, pieces, rows, rank))
        if self.format.has_alpha:
            yield self._alpha(float(rank))

    def _scaled_up(self, piece: Piece, part: int, start: int, end: int) -> Iterator[OutputTensor]:
        """Rows `start` to `end` of an adapter's up, times its scale where the target has no alpha."""
        key = piece.keys["up"]
        scale = 1.0 if self.format.has_alpha else self._scale(piece)
        if scale == 1:
            yield self._copy("up", [key], part=part, rows=(start, end))
        else:
            values = partial(self._scaled_rows, key, scale, start, end)
            dtype = widened(self._dtype(key), scale)
            yield self._computed("up", end - start, self._rank(piece), dtype, values, part=part)

    # What is written

    def _copy(
        self, role: str, keys: Sequence[str], *, part: int = 0, rows: tuple[int, int] | None = None
    ) -> OutputTensor:
        """The bytes of tensors one after the other, or those of some rows of one."""
        header = self.contents.header
        infos = [header.tensors[key] for key in keys]
        ranges = [(header.data_start + info.start, header.data_start + info.end) for info in infos]
        shape = infos[0].shape
        if rows is not None and shape:
            row_bytes = (ranges[0][1] - ranges[0][0]) // shape[0]
            start = ranges[0][0]
            ranges = [(start + rows[0] * row_bytes, start + rows[1] * row_bytes)]
            shape = (rows[1] - rows[0], *shape[1:])
        elif len(keys) > 1:
            shape = (sum(info.shape[0] for info in infos), *shape[1:])

        def chunks() -> Iterator[bytes | memoryview]:
            for start, end in ranges:
                yield from stored_chunks(header.path, start, end)

        num_bytes = sum(end - start for start, end in ranges)
        return OutputTensor(self._name(role, part), infos[0].dtype, shape, num_bytes, chunks)

    def _alpha(self, value: float, *, part: int = 0) -> OutputTensor:
        data = struct.pack("<f", value)
        return OutputTensor(self._name("alpha", part), "F32", (), len(data), lambda: [data])

    def _computed(
        self,
        role: str,
        rows: int,
        columns: int,
        dtype: str,
        values: Callable[[], Values],
        *,
        part: int = 0,
    ) -> OutputTensor:
        num_bytes = rows * columns * DTYPES[dtype][0]
        chunks: Callable[[], Iterable[bytes]] = lambda: [encode(values(), dtype)]  # noqa: E731
        return OutputTensor(self._name(role, part), dtype, (rows, columns), num_bytes, chunks)

    def _name(self, role: str, part: int) -> str:
        return self.format.key(self.module.target, self.module.index, role, part)

    # What is computed

    def _scaled_rows(self, key: str, scale: float, start: int, end: int) -> Values:
        return read_values(self.contents.header, key, (start, end)) * scale

    def _stacked(self, keys: Sequence[str], scale: float) -> Values:
        import numpy as np

        return np.concatenate([self._values(key) for key in keys]) * scale

    def _block_structured(self, pieces: Sequence[Piece], rows: int, rank: int) -> Values:
        import numpy as np

        up = np.zeros((rows, rank))
        widths = [self.contents.width(width) for width in self.module.target.part_widths]
        column = 0
        for piece in pieces:
            assert piece.part is not None
            row, next_column = sum(widths[: piece.part]), column + self._rank(piece)
            block = self._values(piece.keys["up"]) * self._scale(piece)
            up[row : row + len(block), column:next_column] = block
            column = next_column
        return up

    # What the file says

    def _rank(self, piece: Piece) -> int:
        return self.contents.shape(piece.keys["down"])[0]

    def _dtype(self, key: str) -> str:
        return self.contents.header.tensors[key].dtype

    def _scale(self, piece: Piece) -> float:
        """alpha/rank; without an alpha tensor PEFT's configuration tells it, and without that it is 1."""
        if "alpha" in piece.keys:
            values = self._values(piece.keys["alpha"]).reshape(-1)
            if len(values) != 1 or not math.isfinite(values[0]):
                raise HyimgError(
                    f"`{piece.keys['alpha']}` in `{self.contents.path}` is not one finite number"
                )
            return float(values[0]) / self._rank(piece)
        return self.contents.peft_scale(piece.keys["down"], self._rank(piece))

    def _values(self, key: str) -> Values:
        return read_values(self.contents.header, key)


def _is_extra(role: str) -> bool:
    return role not in ("down", "up", "alpha")
