"""The values of a LoRA file's tensors as float64 numpy arrays, and back into a file's dtype. No torch."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from hyimg.errors import HyimgError
from hyimg.lora.writer import stored_chunks
from hyimg.model.safetensors_file import Header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

# bfloat16 is missing in numpy: it is the upper half of a float32
_NUMPY_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
}
# Nor are the 8-bit floats: exponent and mantissa bits, and whether the top exponent holds infinity
_FP8_BITS = {"F8_E4M3": (4, 3, False), "F8_E5M2": (5, 2, True)}


def read_values(header: Header, key: str, rows: tuple[int, int] | None = None) -> Values:
    """A tensor of a file in its shape, or some rows of it.

    Raises `HyimgError` for a dtype that is no number.
    """
    import numpy as np

    info = header.tensors[key]
    start, end, shape = info.start, info.end, info.shape
    if rows is not None:
        row_bytes = (end - start) // shape[0]
        start, end, shape = start + rows[0] * row_bytes, start + rows[1] * row_bytes, (-1, *shape[1:])
    file_range = (header.data_start + start, header.data_start + end)
    raw = b"".join(bytes(chunk) for chunk in stored_chunks(header.path, *file_range))
    if info.dtype == "BF16":
        wide = np.frombuffer(raw, dtype="<u2").astype("<u4") << np.uint32(16)
        return wide.view("<f4").astype(np.float64).reshape(shape)
    if info.dtype in _FP8_BITS:
        return _fp8_values(*_FP8_BITS[info.dtype])[np.frombuffer(raw, dtype=np.uint8)].reshape(shape)
    if info.dtype not in _NUMPY_DTYPES:
        raise HyimgError(
            f"`{key}` in `{header.path}` has the dtype {info.dtype}, which cannot be computed with",
            hint="save the LoRA in bf16, fp16 or fp32",
        )
    return np.frombuffer(raw, dtype=_NUMPY_DTYPES[info.dtype]).astype(np.float64).reshape(shape)


def encode(values: Values, dtype: str) -> bytes:
    """The bytes of `values` in a file's dtype, row-major, rounded to the nearest and ties to even.

    Raises `HyimgError` for a finite value that is too large for it.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        narrow = values.astype("<f4" if dtype == "BF16" else _NUMPY_DTYPES[dtype])
    if np.isinf(narrow).any() and not np.isinf(values).any():
        raise HyimgError(
            f"the result has values up to {np.abs(values).max():.2g}, which {dtype} does not hold",
            hint="give smaller `--weights`",
        )
    if dtype == "BF16":
        bits = narrow.view("<u4")
        rounded = (bits + (((bits >> 16) & np.uint32(1)) + np.uint32(0x7FFF))) >> 16
        # the carry of a NaN's bits could run over into infinity or zero
        return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()
    return narrow.tobytes()


def rounded(values: Values, dtype: str) -> Values:
    """`values` as a file of that dtype holds them."""
    import numpy as np

    raw = encode(values, dtype)
    if dtype == "BF16":
        wide = np.frombuffer(raw, dtype="<u2").astype("<u4") << np.uint32(16)
        return wide.view("<f4").astype(np.float64).reshape(values.shape)
    return np.frombuffer(raw, dtype=_NUMPY_DTYPES[dtype]).astype(np.float64).reshape(values.shape)


@cache
def _fp8_values(exponent_bits: int, mantissa_bits: int, has_infinity: bool) -> Values:
    """The value of each of the 256 bytes (Micikevicius et al., arXiv 2209.05433, table 1)."""
    import numpy as np

    byte = np.arange(256)
    mantissa = (byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    top = exponent == (1 << exponent_bits) - 1
    if has_infinity:
        values = np.where(top, np.where(mantissa == 0, np.inf, np.nan), values)
    else:  # e4m3 as torch has it, "fn": only the very last is no number
        values = np.where(byte & 0x7F == 0x7F, np.nan, values)
    return np.where(byte & 0x80, -values, values)


def widened(dtype: str, scale: float) -> str:
    """The narrowest dtype, of `dtype` and F32, that holds `dtype`'s values times `scale` to float32 rounding.

    A power of two only moves bfloat16's exponent; float16's range is too small for that.
    """
    exact = dtype == "BF16" and math.frexp(scale)[0] in (0.5, -0.5)
    return dtype if scale == 1 or exact or dtype in ("F32", "F64") else "F32"


def same_bytes(header: Header, one: str, other: str) -> bool:
    """Whether two tensors of a file are the same in dtype, shape and every byte."""
    a, b = header.tensors[one], header.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    start = header.data_start
    pairs = zip(
        stored_chunks(header.path, start + a.start, start + a.end),
        stored_chunks(header.path, start + b.start, start + b.end),
        strict=True,
    )
    return all(x == y for x, y in pairs)
