"""The updates of LoRA files as the tensors of another format: renamed, split by rows, fused, summed or scaled.

A module's update is a sum of terms: the adapters that the files hold for it, each on its rows. What a format
writes for it is one adapter on all rows, or one on each row range. Bytes are copied as they stand where names
and row ranges alone change; values are computed (in float64, with numpy) only where a scale must be folded into
`up`, because the target has no alpha, or where several adapters become one.

    one term             down is copied, up's rows are cut to the range                       rank stays
    parts that share     down and scale: up's rows are stacked                                rank stays
    any terms            down is stacked, up becomes block-structured, a block for each       ranks add up
    with a `max_rank`    the best approximation of that rank, where the rank would be larger

But for the last an update stays what it is. A folded scale keeps it to float32 rounding: half precision is
widened where the product would not be exact.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hyimg.errors import HyimgError
from hyimg.lora.compression import Compressed, Compression
from hyimg.lora.contents import AdaptedModule, LoRAContents
from hyimg.lora.formats import Format
from hyimg.lora.pieces import KIND_TITLES
from hyimg.lora.terms import Term, joined, terms_of
from hyimg.lora.values import encode, same_bytes, widened
from hyimg.lora.writer import OutputTensor, stored_chunks
from hyimg.model.safetensors_file import DTYPES

if TYPE_CHECKING:
    from hyimg.lora.values import Values

# What values are computed into; others (fp8, numbers of unequal precision) become float32
_COMPUTED_DTYPES = ("F64", "F32", "BF16", "F16")


def rewrite(
    files: Sequence[tuple[LoRAContents, float]],
    format: Format,
    *,
    compression: Compression | None = None,
    plain: bool = False,
) -> list[OutputTensor]:
    """The sum of the files, each times its weight, in `format`, ready to be written; their bytes are read then.

    `compression` bounds the ranks, and makes LoRAs of LoHa and LoKr that the format cannot carry. `plain`
    refuses LoHa and LoKr even where it could.

    Raises `HyimgError` where the format cannot hold a module's adapter.
    """
    modules = terms_of(files)
    _require_dora_throughout([term for _, terms in modules.values() for term in terms], format)
    outputs: list[OutputTensor] = []
    for module, terms in modules.values():
        parts = range(len(module.target.part_widths)) if format.splits_rows else (None,)
        for part in parts:
            outputs += _Adapter(module, terms, format, part, compression, plain).outputs()
    return outputs


def _require_dora_throughout(terms: Sequence[Term], format: Format) -> None:
    """PEFT's configuration makes every module a DoRA or none."""
    plain = [term for term in terms if not term.piece.is_dora]
    if format.splits_rows and plain and len(plain) < len(terms):
        raise HyimgError(
            f"`{plain[0].contents.path}` is a DoRA in part (`{plain[0].name}` is none), and {format.title} has "
            "it in all modules or in none",
            hint="the reference tool's and ComfyUI's forms hold it",
        )


class _Adapter:
    """What the target format has on one row range of a module (`part` None: on all rows)."""

    def __init__(
        self,
        module: AdaptedModule,
        terms: Sequence[Term],
        format: Format,
        part: int | None,
        compression: Compression | None,
        plain: bool,
    ) -> None:
        self.module, self.format, self.part = module, format, part
        self.compression, self.plain = compression, plain
        self.rows = terms[0].contents.rows(module.target, part)
        self.terms = [t for t in terms if t.rows[0] < self.rows[1] and self.rows[0] < t.rows[1]]

    def outputs(self) -> Iterator[OutputTensor]:
        terms = self.terms
        if not terms:
            return
        if any(term.piece.is_dora for term in terms):
            self._check_dora()
            yield self._magnitude()
        if self._is_carried_whole():
            yield from self._carry(terms[0])
        elif self._is_compressed():
            yield from self._compress()
        elif len(terms) == 1 and terms[0].rows[0] <= self.rows[0] and self.rows[1] <= terms[0].rows[1]:
            yield from self._cut(terms[0])
        elif self._share_down_and_scale():
            yield from self._stack()
        else:
            yield from self._fuse()

    # Which way

    def _is_carried_whole(self) -> bool:
        """Whether a LoHa or LoKr stays one."""
        first = self.terms[0]
        carries = self.format.has_lycoris and not self.plain and first.weight == 1
        return carries and len(self.terms) == 1 and first.kind != "lora" and first.rows == self.rows

    def _is_compressed(self) -> bool:
        """Raises HyimgError for a LoHa or LoKr that no rank was given for."""
        others = [term for term in self.terms if term.kind != "lora"]
        if self.compression is None and others:
            title = KIND_TITLES[others[0].kind]
            if self.plain:
                why, way = "and a plain LoRA is needed", "`hyimg convert-comfy --to kohya --max_rank 64`"
            elif self.format.has_lycoris:
                why, way = "which cannot become a part of another adapter", "`--max_rank 64`"
            else:
                why, way = f"which {self.format.title} cannot hold", "`--max_rank 64`"
            raise HyimgError(
                f"`{others[0].name}` in `{others[0].contents.path}` is of a {title}, {why}",
                hint=f"{way} makes a LoRA of it, the closest one of that rank",
            )
        if self.compression is None:
            return False
        rank = sum(term.rank for term in self.terms)
        return bool(others) or rank > self.compression.rank(self.terms, self.rows)

    def _share_down_and_scale(self) -> bool:
        """Whether the terms are the parts that one adapter was split into."""
        (first, *others), columns = self.terms, self.module.target.part_widths
        if len(self.terms) < len(columns) or any(t.contents is not first.contents for t in others):
            return False
        if any(t.scale != first.scale or t.dtype("up") != first.dtype("up") for t in others):
            return False
        down = first.piece.keys["down"]
        return all(same_bytes(first.contents.header, down, t.piece.keys["down"]) for t in others)

    def _check_dora(self) -> None:
        """A DoRA's update depends on the base's weights: it can be renamed and cut, and not added or compressed."""
        magnitude = next(term for term in self.terms if term.piece.is_dora)
        where = f"`{magnitude.piece.keys['magnitude']}` in `{magnitude.contents.path}` is of a DoRA"
        if self.format.magnitude is None:
            raise HyimgError(
                f"{where}, which {self.format.title} cannot hold",
                hint="the reference tool's, ComfyUI's and diffusers' forms carry it",
            )
        covered = sum(min(t.rows[1], self.rows[1]) - max(t.rows[0], self.rows[0]) for t in self.terms)
        together = all(term.piece.is_dora and term.weight == 1 for term in self.terms)
        if not together or covered != self.rows[1] - self.rows[0]:
            raise HyimgError(
                f"{where}, whose update depends on the base's weights, so that it cannot be scaled, or joined "
                "with an adapter that is none"
            )
        if not self._is_carried_whole() and self._is_compressed():
            raise HyimgError(
                f"{where}, whose update depends on the base's weights, so that there is no closest one of a "
                "lower rank"
            )

    # The ways

    def _carry(self, term: Term) -> Iterator[OutputTensor]:
        """A LoHa or LoKr under new names."""
        for role in term.piece.keys:
            if role != "magnitude":
                yield self._copy(role, [term])

    def _cut(self, term: Term) -> Iterator[OutputTensor]:
        """An adapter's rows; its scale stays in alpha, or is folded into up."""
        rows = (self.rows[0] - term.rows[0], self.rows[1] - term.rows[0])
        scale = 1.0 if self.format.has_alpha else term.scale
        yield self._copy("down", [term])
        if scale == 1:
            yield self._copy("up", [term], rows=rows)
        else:
            values: Callable[[], Values] = lambda: term.values("up", rows) * scale  # noqa: E731
            shape = (rows[1] - rows[0], term.rank)
            yield self._computed("up", shape, widened(term.dtype("up"), scale), values)
        if self.format.has_alpha:
            kept = "alpha" in term.piece.keys and term.weight == 1
            yield self._copy("alpha", [term]) if kept else self._alpha(term.scale * term.rank)

    def _stack(self) -> Iterator[OutputTensor]:
        """Adapters that share down: one whose up has all their rows."""
        import numpy as np

        first, terms = self.terms[0], self.terms
        yield self._copy("down", [first])
        if self.format.has_alpha or first.scale == 1:
            yield self._copy("up", terms)
        else:
            values: Callable[[], Values] = lambda: (  # noqa: E731
                np.concatenate([term.values("up") for term in terms]) * first.scale
            )
            shape = (self.rows[1] - self.rows[0], first.rank)
            yield self._computed("up", shape, widened(first.dtype("up"), first.scale), values)
        if self.format.has_alpha:
            yield self._alpha(first.scale * first.rank)

    def _fuse(self) -> Iterator[OutputTensor]:
        """Any terms: one adapter of the summed rank. Rows that no term is on are zeros in up."""
        terms = self.terms
        rank, columns = (
            sum(term.rank for term in terms),
            terms[0].contents.shape(terms[0].piece.keys["down"])[1],
        )
        if len({term.dtype("down") for term in terms}) == 1:
            yield self._copy("down", terms)
        else:
            yield self._computed("down", (rank, columns), "F32", lambda: joined(terms, self.rows)[1])
        dtype = _common_dtype([widened(term.dtype("up"), term.scale) for term in terms])
        shape = (self.rows[1] - self.rows[0], rank)
        yield self._computed("up", shape, dtype, lambda: joined(terms, self.rows)[0])
        if self.format.has_alpha:
            yield self._alpha(float(rank))

    def _compress(self) -> Iterator[OutputTensor]:
        """The best approximation of a lower rank, in the precision of what it is made of."""
        assert self.compression is not None
        terms = self.terms
        rank = self.compression.rank(terms, self.rows)
        dtype = _common_dtype([t.dtype(role) for t in terms for role in t.piece.weight_roles])
        name = self.format.module_name(self.module.target, self.module.index, self.part or 0)
        compressed = Compressed(self.compression, name, terms, self.rows, dtype)
        columns = terms[0].contents.width(self.module.target.in_width)
        for role, shape in (("down", (rank, columns)), ("up", (self.rows[1] - self.rows[0], rank))):
            num_bytes = shape[0] * shape[1] * DTYPES[dtype][0]
            chunks = partial(compressed.half, role)
            yield OutputTensor(self._name(role), dtype, shape, num_bytes, chunks)
        if self.format.has_alpha:
            yield self._alpha(float(rank))

    def _magnitude(self) -> OutputTensor:
        """The lengths of the rows, (O, 1), or (O) as PEFT has it; those of columns go on as they are."""
        first = self.terms[0]
        shape = first.contents.shape(first.piece.keys["magnitude"])
        num_rows = first.rows[1] - first.rows[0]
        if shape not in ((num_rows,), (num_rows, 1)):
            if first.rows == self.rows and not self.format.splits_rows:
                return self._copy("magnitude", [first])
            raise HyimgError(
                f"`{first.piece.keys['magnitude']}` in `{first.contents.path}` has the shape {list(shape)}, and "
                f"{self.format.title} holds a length for each of the {num_rows} rows"
            )
        rows = None
        if len(self.terms) == 1:
            rows = (self.rows[0] - first.rows[0], self.rows[1] - first.rows[0])
        count = self.rows[1] - self.rows[0]
        copy = self._copy("magnitude", self.terms, rows=rows)
        return replace(copy, shape=(count,) if self.format.splits_rows else (count, 1))

    # What is written

    def _copy(self, role: str, terms: Sequence[Term], *, rows: tuple[int, int] | None = None) -> OutputTensor:
        """The bytes of a tensor of each term, one after the other, or those of some rows of one."""
        files = [
            (term.contents.header, term.contents.header.tensors[term.piece.keys[role]]) for term in terms
        ]
        ranges = [(h.path, h.data_start + info.start, h.data_start + info.end) for h, info in files]
        shape = files[0][1].shape
        if rows is not None and shape:
            path, start, end = ranges[0]
            row_bytes = (end - start) // shape[0]
            ranges = [(path, start + rows[0] * row_bytes, start + rows[1] * row_bytes)]
            shape = (rows[1] - rows[0], *shape[1:])
        elif len(terms) > 1:
            shape = (sum(info.shape[0] for _, info in files), *shape[1:])

        def chunks() -> Iterator[bytes | memoryview]:
            for path, start, end in ranges:
                yield from stored_chunks(path, start, end)

        num_bytes = sum(end - start for _, start, end in ranges)
        return OutputTensor(self._name(role), files[0][1].dtype, shape, num_bytes, chunks)

    def _alpha(self, value: float) -> OutputTensor:
        data = struct.pack("<f", value)
        return OutputTensor(self._name("alpha"), "F32", (), len(data), lambda: [data])

    def _computed(
        self, role: str, shape: tuple[int, int], dtype: str, values: Callable[[], Values]
    ) -> OutputTensor:
        num_bytes = shape[0] * shape[1] * DTYPES[dtype][0]
        chunks: Callable[[], Iterable[bytes]] = lambda: [encode(values(), dtype)]  # noqa: E731
        return OutputTensor(self._name(role), dtype, shape, num_bytes, chunks)

    def _name(self, role: str) -> str:
        return self.format.key(self.module.target, self.module.index, role, self.part or 0)


def _common_dtype(dtypes: Sequence[str]) -> str:
    """The dtype of all, F32 where they differ or cannot be computed into."""
    first = dtypes[0]
    return first if set(dtypes) == {first} and first in _COMPUTED_DTYPES else "F32"
