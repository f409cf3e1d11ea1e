"""Writes safetensors files of any size with little memory, and with the hashes of the reference tool.

The order of tensors and the header equal the safetensors library's byte for byte, except for the order of metadata
(random in the library), so that hashes of the file agree with the reference tool's.

`sshs_model_hash`: SHA-256 of the tensor bytes. `sshs_legacy_hash`: the first 8 hex digits of the SHA-256 of
bytes 0x100000 to 0x110000 of the file as it would be with only the `ss_` entries of its metadata. Both agree
with the recipes of tests/golden/lora_network.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hyimg.cache.atomic import atomic_path
from hyimg.checkpoints.safetensors_file import DTYPES, read_header, require_header_size
from hyimg.errors import RunError

CHUNK_BYTES = 1 << 16
"""Small enough to stay in the processor's cache until it is hashed and written."""
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000

# The order in which the safetensors library lays out dtypes, and names within one
_DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
assert set(_DTYPE_ORDER) == set(DTYPES)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: `chunks()` yields its `num_bytes` bytes in row-major order, in pieces of any size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def write_lora(
    dst: str | os.PathLike[str],
    tensors: Iterable[OutputTensor],
    metadata: Mapping[str, str] | None,
    *,
    root: Path | None = None,
    durable: bool = True,
) -> None:
    """Writes a LoRA file atomically, with both hashes in its metadata.

    `metadata` None writes no metadata, and no hashes. `root` and `durable` as in `atomic_path`. Raises as
    `atomic_path`, and `HyimgError` for a header that exceeds the format's limit.
    """
    if metadata is None:
        write_tensors(dst, tensors, None, root=root, durable=durable)
        return
    ordered = _ordered(tensors)
    hashes = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    header = _header(ordered, {**metadata, **hashes})
    require_header_size(len(header) - 8, metadata, Path(dst))
    with _new_file(dst, root, durable) as file:
        _write_all(file, [header])
        hashes["sshs_model_hash"] = _write_all(file, _all_chunks(ordered), hashlib.sha256())
        hashed_header = _header(ordered, {k: v for k, v in metadata.items() if k.startswith("ss_")})
        hashes["sshs_legacy_hash"] = _legacy_hash(file, hashed_header, data_start=len(header))
        # The hashes are as long as their placeholders, so the header's length is unchanged
        file.seek(0)
        _write_all(file, [_header(ordered, {**metadata, **hashes})])


def write_tensors(
    dst: str | os.PathLike[str],
    tensors: Iterable[OutputTensor],
    metadata: Mapping[str, str] | None,
    *,
    root: Path | None = None,
    durable: bool = True,
) -> None:
    """Writes any safetensors file atomically; raises as `write_lora`."""
    ordered = _ordered(tensors)
    header = _header(ordered, metadata)
    require_header_size(len(header) - 8, metadata or {}, Path(dst))
    with _new_file(dst, root, durable) as file:
        _write_all(file, [header])
        _write_all(file, _all_chunks(ordered))


@contextmanager
def _new_file(dst: str | os.PathLike[str], root: Path | None, durable: bool) -> Iterator[BinaryIO]:
    """A temporary file that becomes `dst` after its header was read back."""
    with (
        atomic_path(Path(dst), root=root, durable=durable, verify=read_header) as temporary,
        open(temporary, "w+b", buffering=0) as file,
    ):
        yield file


def _ordered(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    return sorted(tensors, key=lambda tensor: (_DTYPE_ORDER.index(tensor.dtype), tensor.name))


def stored_chunks(path: Path, start: int, end: int) -> Iterator[bytes | memoryview]:
    """Yields bytes `start` to `end` of a file in chunks of `CHUNK_BYTES`, each valid until the next is requested."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - start)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            chunk = buffer[: end - start]
            count = 0
            while count < len(chunk):
                if not (got := file.readinto(chunk[count:])):
                    raise RunError(f"`{path}` was truncated while it was read")
                count += got
            yield chunk
            start += count


def _all_chunks(tensors: Sequence[OutputTensor]) -> Iterator[bytes | memoryview]:
    for tensor in tensors:
        num_bytes = 0
        for chunk in tensor.chunks():
            num_bytes += len(chunk)
            yield chunk
        assert num_bytes == tensor.num_bytes, tensor.name


def _write_all(
    file: BinaryIO, chunks: Iterable[bytes | memoryview], digest: hashlib._Hash | None = None
) -> str:
    """Writes chunks, and returns the hex digest of all of them if `digest` is given."""
    for chunk in chunks:
        if digest is not None:
            digest.update(chunk)
        written = file.write(chunk)
        while written < len(chunk):
            written += file.write(chunk[written:])
    return digest.hexdigest() if digest is not None else ""


def _header(tensors: Sequence[OutputTensor], metadata: Mapping[str, str] | None) -> bytes:
    """The length and the JSON, padded with spaces to a multiple of 8 bytes."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _legacy_hash(file: BinaryIO, header: bytes, *, data_start: int) -> str:
    """Hashes a window of the file that would consist of `header` and the data of `file`."""
    end = _LEGACY_START + _LEGACY_BYTES
    window = header[_LEGACY_START:end]
    file.seek(data_start + max(_LEGACY_START - len(header), 0))
    while len(window) < _LEGACY_BYTES and (chunk := file.read(_LEGACY_BYTES - len(window))):
        window += chunk
    return hashlib.sha256(window).hexdigest()[:8]
