"""The bytes of a cache entry: a safetensors file with a checksum of itself.

`__metadata__` holds the entry's key, its recipe, and a sha256 over the whole file with the checksum's own 64 characters
set to zero, so a flipped bit is noticed wherever it is, header included. The bytes are a function of key, recipe
and tensors. Sizes and checksums need no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hyimg.config.documents import parse_json
from hyimg.errors import HyimgError

if TYPE_CHECKING:
    import torch

# The format's own limit
MAX_HEADER_BYTES = 100_000_000
_NO_CHECKSUM = "0" * 64
# safetensors' name -> torch's, and bytes per value
_DTYPES = {"F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4)}
_MAX_DIMENSIONS = 8
_ALIGNMENT = 8

EntryShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""The tensors of an entry: name -> (dtype as safetensors names it, shape)."""
StoredTensor = tuple[str, tuple[int, ...], memoryview]
"""A tensor in a file: (dtype as safetensors names it, shape, little-endian bytes in C order)."""

# `json.dumps` would build an encoder for every call, which is most of the cost of a key
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def canonical_json(value: object) -> str:
    """JSON with one spelling for equal values: what keys are hashed from."""
    return _ENCODER.encode(value)


def file_size(shapes: EntryShapes, recipe: Mapping[str, object]) -> int:
    """The size in bytes of the file of an entry with these tensors. Raises as `pack`."""
    return len(_header("0" * 64, shapes, recipe)) + sum(_num_bytes(*tensor) for tensor in shapes.values())


def pack(key: str, tensors: Mapping[str, torch.Tensor], recipe: Mapping[str, object]) -> bytes:
    """The file of an entry of float16, bfloat16 or float32 tensors, which may be on any device.

    Raises `HyimgError` if the recipe (a prompt) is longer than a header may be.
    """
    import torch

    names = {getattr(torch, dtype): name for name, (dtype, _) in _DTYPES.items()}
    shapes = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    flat = [tensor.detach().cpu().contiguous().flatten() for tensor in tensors.values()]
    bodies = [values.view(torch.uint8).numpy().tobytes() for values in flat]
    data = b"".join([_header(key, shapes, recipe), *bodies])
    return _replace_checksum(data, _NO_CHECKSUM, hashlib.sha256(data).hexdigest())


def _header(key: str, shapes: EntryShapes, recipe: Mapping[str, object]) -> bytes:
    """The file up to the first tensor's bytes, with the checksum set to zero."""
    metadata = {"checksum": _NO_CHECKSUM, "key": key, "recipe": canonical_json(recipe)}
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + _num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        longest = max((str(value) for value in recipe.values()), key=len, default="")
        raise HyimgError(
            f"the cache entry of `{longest[:60]}...` would have a header of {len(text)} bytes, and a safetensors file "
            f"holds {MAX_HEADER_BYTES}",
            hint="shorten the caption",
        )
    return len(text).to_bytes(8, "little") + text


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return _DTYPES[dtype][1] * math.prod(shape)


def unpack(key: str, data: bytes) -> dict[str, StoredTensor]:
    """The tensors of an entry's file, its checksum verified. Raises `ValueError` that says what is wrong with it."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError("it is truncated")
    try:
        header: dict[str, Any] = parse_json(data[8 : 8 + size], "its header")
    except HyimgError as error:
        raise ValueError("its header cannot be read") from error
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise ValueError("its header cannot be read")
    checksum = metadata.get("checksum")
    if not isinstance(checksum, str) or len(checksum) != len(_NO_CHECKSUM):
        raise ValueError("it has no checksum")
    if hashlib.sha256(_replace_checksum(data, checksum, _NO_CHECKSUM)).hexdigest() != checksum:
        raise ValueError("its checksum does not match its content")
    if metadata.get("key") != key:
        raise ValueError("it was written under another name")
    body = memoryview(data)[8 + size :]
    return {name: _stored_tensor(name, entry, body) for name, entry in header.items()}


def _stored_tensor(name: str, entry: object, body: memoryview) -> StoredTensor:
    # the checksum catches damage, not a header that somebody else wrote
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
            dtype in _DTYPES
            and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            and len(shape) <= _MAX_DIMENSIONS
            and _num_bytes(dtype, tuple(shape)) == end - begin
            and end <= len(body)
        ):
            return dtype, tuple(shape), body[begin:end]
    raise ValueError(f"the header's entry for `{name}` is wrong")


def to_tensor(stored: StoredTensor) -> torch.Tensor:
    """A copy on the CPU."""
    import torch

    dtype, shape, data = stored
    torch_dtype = getattr(torch, _DTYPES[dtype][0])
    if 0 in shape:
        return torch.empty(shape, dtype=torch_dtype)
    return torch.frombuffer(bytearray(data), dtype=torch_dtype).reshape(shape)


def _replace_checksum(data: bytes, old: str, new: str) -> bytes:
    # keys are sorted, so the metadata come first and the first occurrence is the checksum's own
    return data.replace(f'"checksum":"{old}"'.encode(), f'"checksum":"{new}"'.encode(), 1)
