"""The bytes of a cache entry: a safetensors file that can tell whether it is whole.

Its `__metadata__` holds the entry's key, its recipe, and a sha256 over the whole file as it is while the
checksum's own 64 characters are zeros; so a flipped bit anywhere, header included, is seen. The bytes are
a function of key, recipe and tensors. Written by hand (the format is a length, a JSON header and the
tensors' bytes), which needs no torch and no numpy type for bfloat16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NO_CHECKSUM = "0" * 64
_ALIGNMENT = 8


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in a file.

    `dtype` is safetensors' name ("F16", "BF16", "F32"), `data` the little-endian bytes in C order.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


# made once: `json.dumps` makes one for every call, which is most of the cost of a key
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def canonical_json(value: object) -> str:
    """JSON with one spelling for equal values: what keys are hashed from."""
    return _ENCODER.encode(value)


def pack(key: str, tensors: Mapping[str, RawTensor], recipe: Mapping[str, object]) -> bytes:
    """The file of an entry."""
    metadata = {"checksum": _NO_CHECKSUM, "key": key, "recipe": canonical_json(recipe)}
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data = b"".join([len(text).to_bytes(8, "little"), text, *(t.data for t in tensors.values())])
    return _exchange(data, _NO_CHECKSUM, hashlib.sha256(data).hexdigest())


def unpack(key: str, data: bytes) -> dict[str, RawTensor]:
    """The tensors of an entry's file. Raises `ValueError` that says what is wrong with it."""
    header, start = _header(data)
    metadata = header.pop("__metadata__", {})
    checksum = metadata.get("checksum")
    if not isinstance(checksum, str) or len(checksum) != len(_NO_CHECKSUM):
        raise ValueError("it carries no checksum")
    if hashlib.sha256(_exchange(data, checksum, _NO_CHECKSUM)).hexdigest() != checksum:
        raise ValueError("its checksum does not match its content")
    if metadata.get("key") != key:
        raise ValueError("it was written under another name")
    body = memoryview(data)[start:]
    return {name: _tensor(entry, body) for name, entry in header.items()}


def _tensor(entry: dict[str, Any], body: memoryview) -> RawTensor:
    begin, end = entry["data_offsets"]
    return RawTensor(entry["dtype"], tuple(entry["shape"]), body[begin:end])


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError("it is cut short")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError as error:
        raise ValueError("its header cannot be read") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("its header cannot be read")
    return header, 8 + size


def _exchange(data: bytes, old: str, new: str) -> bytes:
    # the metadata come first in the header, so the first occurrence is the checksum's own
    return data.replace(f'"checksum":"{old}"'.encode(), f'"checksum":"{new}"'.encode(), 1)
