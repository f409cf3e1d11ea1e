"""The adapters of LoRA files as the tensors of another format: renamed, split by rows, fused, summed or scaled.

A module's update is the sum of the adapters that the files hold for it, each on its rows. A format holds one adapter
for all rows, or one for each row range. Bytes are copied unchanged where only names and row ranges change; values
are computed (in float64, with torch) only where a scale must be folded into a matrix, because the target has no alpha,
or where several adapters become one.

    one adapter                 down is copied, up is cut to the row range                      same rank
    parts with the same down    up is stacked                                                   same rank
    and scale
    any adapters                down is stacked, up is block-structured                         the ranks add up
    with a `max_rank`           the best approximation of that rank, if the rank would exceed it

Only the last changes an update. A folded scale is exact to float32 rounding: half precision is widened where the
product would not be exact.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from hyimg.checkpoints.safetensors_file import DTYPES
from hyimg.checkpoints.safetensors_writer import CHUNK_BYTES, OutputTensor, stored_chunks
from hyimg.errors import HyimgError
from hyimg.lora.files.formats import Format
from hyimg.lora.files.stored import KIND_TITLES, StoredAdapter, by_module

if TYPE_CHECKING:
    from torch import Tensor

    from hyimg.lora.files.compression import Compression

# Dtypes that values are computed into; others (fp8, or several) become float32
_COMPUTED_DTYPES = ("F64", "F32", "BF16", "F16")
_CHUNK_VALUES = 1 << 15  # up to here torch uses one thread: more only wait for each other at so little work
# From which unsigned integer on the bits of a number without its sign are not finite
_FIRST_NOT_FINITE = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}


def rewrite(
    adapters: Sequence[StoredAdapter],
    format: Format,
    *,
    compression: Compression | None = None,
    plain: bool = False,
    finite: bool = True,
) -> list[OutputTensor]:
    """The sum of the adapters in `format`, ready to be written; their bytes are read only then.

    `compression` limits the ranks, and turns LoHa and LoKr into LoRA where the format cannot hold them. `plain`
    refuses LoHa and LoKr even where it could. NaN and infinity are refused as the bytes are read, unless not `finite`.

    Raises `HyimgError` where the format cannot hold a module's adapter.
    """
    without = [adapter for adapter in adapters if not adapter.is_dora]
    if format.splits_rows and 0 < len(without) < len(adapters):  # PEFT's configuration is for all modules
        raise HyimgError(
            f"only some modules of `{without[0].header.path}` are a DoRA (`{without[0].key.text}` is not), but "
            f"{format.title} has it in all modules or in none",
            hint="the reference tool's and ComfyUI's formats can hold it",
        )
    outputs: list[OutputTensor] = []
    for module in by_module(adapters):
        first = module[0]
        for part in range(len(first.key.linear.part_widths)) if format.splits_rows else (None,):
            start, end = rows = first.rows_of(part)
            own = [adapter for adapter in module if adapter.rows[0] < end and start < adapter.rows[1]]
            if own:
                outputs += _Target(own, part, rows, format, compression, plain, finite).outputs()
    return outputs


@dataclass(frozen=True)
class _Target:
    """What the target format holds for one row range of a module (`part` None: for all rows)."""

    adapters: Sequence[StoredAdapter]
    part: int | None
    rows: tuple[int, int]
    format: Format
    compression: Compression | None
    plain: bool
    finite: bool

    def outputs(self) -> Iterator[OutputTensor]:
        first, *others = self.adapters
        if any(adapter.is_dora for adapter in self.adapters):
            self._check_dora()
            yield self._magnitude()
        covers = not others and first.rows[0] <= self.rows[0] and self.rows[1] <= first.rows[1]
        if self._stays_lycoris():
            yield from self._carry(first)
        elif self._is_compressed():
            yield from self._compress()
        elif covers:
            yield from self._carry(first)
        elif self._share_down_and_scale():
            yield from self._stack()
        else:
            yield from self._fuse()

    # Decisions

    def _stays_lycoris(self) -> bool:
        """Whether a LoHa or LoKr remains one."""
        first, *others = self.adapters
        can = self.format.has_lycoris and not self.plain and first.weight == 1 and not others
        return can and first.kind != "lora" and first.rows == self.rows

    def _is_compressed(self) -> bool:
        """Raises HyimgError for a LoHa or LoKr without a rank to compress it to."""
        others = [adapter for adapter in self.adapters if adapter.kind != "lora"]
        if self.compression is None and others:
            title = KIND_TITLES[others[0].kind]
            way = "`--max_rank 64`"
            if self.plain:
                why, way = "but a plain LoRA is needed", "`hyimg convert-comfy --to kohya --max_rank 64`"
            elif self.format.has_lycoris:
                why = "which cannot become a part of another adapter"
            else:
                why = f"which {self.format.title} cannot hold"
            raise HyimgError(
                f"`{others[0].key.text}` in `{others[0].header.path}` belongs to a {title}, {why}",
                hint=f"{way} makes the closest LoRA of that rank of it",
            )
        if self.compression is None:
            return False
        rank = sum(adapter.rank or 1 for adapter in self.adapters)
        return bool(others) or rank > self.compression.rank(self.adapters, self.rows)

    def _share_down_and_scale(self) -> bool:
        """Whether the adapters are the parts that one adapter was split into."""
        (first, *others), parts = self.adapters, self.adapters[0].key.linear.part_widths
        if len(self.adapters) < len(parts) or any(a.header is not first.header for a in others):
            return False
        if any(a.scale != first.scale or a.dtype_of("up") != first.dtype_of("up") for a in others):
            return False
        return all(_same_bytes(first, other, "down") for other in others)

    def _check_dora(self) -> None:
        """A DoRA's update depends on the base's weights: it can be renamed and cut, but not added or compressed."""
        dora = next(adapter for adapter in self.adapters if adapter.is_dora)
        where = f"`{dora.keys['magnitude'].text}` in `{dora.header.path}` belongs to a DoRA"
        if self.format.magnitude is None:
            raise HyimgError(
                f"{where}, which {self.format.title} cannot hold",
                hint="the reference tool's, ComfyUI's and diffusers' formats can",
            )
        covered = sum(min(a.rows[1], self.rows[1]) - max(a.rows[0], self.rows[0]) for a in self.adapters)
        together = all(adapter.is_dora and adapter.weight == 1 for adapter in self.adapters)
        if not together or covered != self.rows[1] - self.rows[0]:
            raise HyimgError(
                f"{where}, whose update depends on the base's weights: it cannot be scaled, or combined with another "
                "kind of adapter"
            )
        if not self._stays_lycoris() and self._is_compressed():
            raise HyimgError(
                f"{where}, whose update depends on the base's weights: it has no closest one of a lower rank"
            )

    # Ways

    def _carry(self, adapter: StoredAdapter) -> Iterator[OutputTensor]:
        """One adapter under new names, cut to the rows. A scale that has no place in alpha is folded into a matrix."""
        keeps_alpha = self.format.has_alpha and "alpha" in adapter.keys and adapter.weight == 1
        scale = 1.0 if keeps_alpha else adapter.scale
        folds = scale != 1 and (not self.format.has_alpha or adapter.rank is None)
        folded = "up" if adapter.kind == "lora" else "lokr_w1"
        for role in adapter.matrices:
            rows = self._own_rows(adapter) if role == "up" else None
            if folds and role == folded:
                start, end = rows or (0, adapter.shape_of(role)[0])
                shape = (end - start, adapter.shape_of(role)[1])
                values = partial(_scaled_rows, adapter, role, (start, end), scale)
                yield self._computed(role, shape, _widened(adapter.dtype_of(role), scale), values)
            else:
                yield self._copy(role, [adapter], rows)
        if keeps_alpha:
            yield self._copy("alpha", [adapter])
        elif self.format.has_alpha and not folds and (adapter.kind == "lora" or scale != 1):
            yield self._alpha(scale * (adapter.rank or 1))

    def _stack(self) -> Iterator[OutputTensor]:
        """Adapters with the same down: one adapter whose up has all their rows."""
        first = self.adapters[0]
        yield self._copy("down", [first])
        if self.format.has_alpha or first.scale == 1:
            yield self._copy("up", self.adapters)
        else:
            shape = (self.rows[1] - self.rows[0], first.shape_of("up")[1])
            dtype = _widened(first.dtype_of("up"), first.scale)
            yield self._computed("up", shape, dtype, self._scaled_ups)
        if self.format.has_alpha:
            yield self._alpha(first.scale * (first.rank or 1))

    def _scaled_ups(self) -> Iterator[Tensor]:
        for adapter in self.adapters:
            rows = (0, adapter.shape_of("up")[0])
            yield from _scaled_rows(adapter, "up", rows, self.adapters[0].scale)

    def _fuse(self) -> Iterator[OutputTensor]:
        """Any adapters: one of the summed rank. Rows that none of them changes are zeros in up."""
        from hyimg.lora.files.compression import joined

        adapters = self.adapters
        rank = sum(adapter.rank or 1 for adapter in adapters)
        if len({adapter.dtype_of("down") for adapter in adapters}) == 1:
            yield self._copy("down", adapters)
        else:
            shape = (rank, adapters[0].in_features)
            yield self._computed("down", shape, "F32", lambda: [joined(adapters, self.rows)[1]])
        dtype = _common_dtype([_widened(a.dtype_of("up"), a.scale) for a in adapters])
        shape = (self.rows[1] - self.rows[0], rank)
        yield self._computed("up", shape, dtype, lambda: [joined(adapters, self.rows)[0]])
        if self.format.has_alpha:
            yield self._alpha(float(rank))

    def _compress(self) -> Iterator[OutputTensor]:
        """The best approximation of a lower rank, in the common dtype of the adapters."""
        assert self.compression is not None
        adapters, compression = self.adapters, self.compression
        rank = compression.rank(adapters, self.rows)
        dtype = _common_dtype([a.dtype_of(role) for a in adapters for role in a.matrices])
        key = adapters[0].key
        name = self.format.module_name(key.linear, key.index, self.part or 0)
        waiting: dict[
            str, Tensor
        ] = {}  # the tensors of a module are neighbours in a file, so few wait at a time

        def half(role: str) -> Callable[[], Iterator[memoryview]]:
            def chunks() -> Iterator[memoryview]:
                if role not in waiting:
                    down, up = compression.compress(name, adapters, self.rows, dtype)
                    waiting.update(down=down, up=up)
                yield tensor_bytes(waiting.pop(role))

            return chunks

        shapes = {"down": (rank, adapters[0].in_features), "up": (self.rows[1] - self.rows[0], rank)}
        for role, shape in shapes.items():
            yield OutputTensor(
                self._name(role), dtype, shape, math.prod(shape) * DTYPES[dtype][0], half(role)
            )
        if self.format.has_alpha:
            yield self._alpha(float(rank))

    def _magnitude(self) -> OutputTensor:
        """The norms of the rows, (O, 1), or (O) in PEFT; those of columns can only be copied."""
        first = self.adapters[0]
        shape = first.shape_of("magnitude")
        num_rows = first.rows[1] - first.rows[0]
        if shape not in ((num_rows,), (num_rows, 1)):
            if first.rows == self.rows and not self.format.splits_rows:
                return self._copy("magnitude", [first])
            raise HyimgError(
                f"`{first.keys['magnitude'].text}` in `{first.header.path}` has the shape {list(shape)}, but "
                f"{self.format.title} holds a norm for each of the {num_rows} rows"
            )
        rows = self._own_rows(first) if len(self.adapters) == 1 else None
        count = self.rows[1] - self.rows[0]
        copy = self._copy("magnitude", self.adapters, rows)
        return replace(copy, shape=(count,) if self.format.splits_rows else (count, 1))

    # Tensors

    def _own_rows(self, adapter: StoredAdapter) -> tuple[int, int]:
        """The target's rows, counted from the adapter's first."""
        return self.rows[0] - adapter.rows[0], self.rows[1] - adapter.rows[0]

    def _copy(
        self, role: str, adapters: Sequence[StoredAdapter], rows: tuple[int, int] | None = None
    ) -> OutputTensor:
        """A tensor of each adapter, one after the other, or some rows of the only one, byte by byte."""
        ranges = [adapter.bytes_of(role, rows) for adapter in adapters]
        height, *rest = adapters[0].shape_of(role) or (None,)
        shape: tuple[int, ...] = ()
        if height is not None:
            own = sum(adapter.shape_of(role)[0] for adapter in adapters)
            shape = (rows[1] - rows[0] if rows else own, *rest)

        def chunks() -> Iterator[bytes | memoryview]:
            for adapter, (start, end) in zip(adapters, ranges, strict=True):
                if self.finite:
                    yield from finite_chunks(adapter, role, start, end)
                else:
                    yield from stored_chunks(adapter.header.path, start, end)

        num_bytes = sum(end - start for start, end in ranges)
        return OutputTensor(self._name(role), adapters[0].dtype_of(role), shape, num_bytes, chunks)

    def _alpha(self, value: float) -> OutputTensor:
        data = struct.pack("<f", value)
        return OutputTensor(self._name("alpha"), "F32", (), len(data), lambda: [data])

    def _computed(
        self, role: str, shape: tuple[int, int], dtype: str, values: Callable[[], Iterable[Tensor]]
    ) -> OutputTensor:
        """A tensor from float64 `values`, some rows at a time."""
        from hyimg.lora.files.compression import rounded

        def chunks() -> Iterator[memoryview]:
            for part in values():
                if self.finite and not bool(part.isfinite().all()):
                    raise self._not_finite()
                yield tensor_bytes(rounded(part, dtype))

        return OutputTensor(self._name(role), dtype, shape, math.prod(shape) * DTYPES[dtype][0], chunks)

    def _not_finite(self) -> HyimgError:
        """The error for the first tensor that is not finite; for the first one at all if only their sum is not."""
        keys = [(adapter, role) for adapter in self.adapters for role in adapter.keys]
        bad = (key for key in keys if not bool(key[0].tensor(key[1]).double().isfinite().all()))
        adapter, role = next(bad, keys[0])
        return not_finite(adapter.header.path, adapter.keys[role].text)

    def _name(self, role: str) -> str:
        name = self.adapters[0].key.renamed(self.format, self.part, role)
        assert name is not None, role
        return name


def _scaled_rows(adapter: StoredAdapter, role: str, rows: tuple[int, int], scale: float) -> Iterator[Tensor]:
    """Rows of a matrix times `scale` in float64, `_CHUNK_VALUES` values at a time."""
    step = max(1, _CHUNK_VALUES // adapter.shape_of(role)[1])
    for start in range(*rows, step):
        yield adapter.tensor(role, (start, min(start + step, rows[1]))).double() * scale


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major."""
    import torch

    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def finite_chunks(adapter: StoredAdapter, role: str, start: int, end: int) -> Iterator[bytes | memoryview]:
    """Bytes `start` to `end` of a file, all of them of one tensor, as `stored_chunks` yields them.

    Raises `HyimgError` for NaN and infinity before the chunk with it is yielded. numpy, since torch takes seconds to
    import.
    """
    import numpy as np

    chunks = stored_chunks(adapter.header.path, start, end)
    dtype, first = _FIRST_NOT_FINITE.get(adapter.dtype_of(role), (None, 0))
    if dtype is None:
        yield from chunks
        return
    bits = 8 * np.dtype(dtype).itemsize
    mask = np.dtype(dtype).type((1 << (bits - 1)) - 1)
    magnitudes = np.empty(CHUNK_BYTES * 8 // bits, dtype)  # one array, which stays in the processor's cache
    for chunk in chunks:
        numbers = np.frombuffer(chunk, dtype)
        if np.bitwise_and(numbers, mask, out=magnitudes[: len(numbers)]).max() >= first:
            raise not_finite(adapter.header.path, adapter.keys[role].text)
        yield chunk


def not_finite(path: str | os.PathLike[str], name: str) -> HyimgError:
    """The error for a LoRA file whose tensor `name` holds NaN or infinity."""
    return HyimgError(
        f"the LoRA file `{path}` holds NaN or infinity, in `{name}`",
        hint="the training diverged: use a checkpoint that was saved earlier",
    )


def _same_bytes(one: StoredAdapter, other: StoredAdapter, role: str) -> bool:
    """Whether a tensor is the same in two adapters, in dtype, shape and every byte."""
    if (one.dtype_of(role), one.shape_of(role)) != (other.dtype_of(role), other.shape_of(role)):
        return False
    pairs = zip(*(stored_chunks(a.header.path, *a.bytes_of(role)) for a in (one, other)), strict=True)
    return all(x == y for x, y in pairs)


def _widened(dtype: str, scale: float) -> str:
    """The narrowest dtype, of `dtype` and F32, that holds `dtype`'s values times `scale` to float32 rounding.

    A power of two only changes bfloat16's exponent; float16's range is too small for that.
    """
    exact = dtype == "BF16" and math.frexp(scale)[0] in (0.5, -0.5)
    return dtype if scale == 1 or exact or dtype in ("F32", "F64") else "F32"


def _common_dtype(dtypes: Sequence[str]) -> str:
    """The dtype that all have; F32 if they differ or it cannot be computed into."""
    first = dtypes[0]
    return first if set(dtypes) == {first} and first in _COMPUTED_DTYPES else "F32"
