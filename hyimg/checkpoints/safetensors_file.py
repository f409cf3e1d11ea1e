"""Reads safetensors files: headers, single tensors, sharded folders; without the safetensors library.

A header is read without importing torch, so that every command can check a 35 GB file in milliseconds, with a message
for each kind of damage, and tensors are mapped copy-on-write. The format: an 8-byte little-endian header length, a
JSON header, the tensors' bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyimg.checkpoints.model_files import unwrapped
from hyimg.config.documents import parse_json, read_bounded
from hyimg.errors import HyimgError, RunError, first_few

if TYPE_CHECKING:
    import torch

# The format's limit
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32  # more than any tensor of a model; numpy and torch allow 64

# name in the file -> (bytes per value, name of the torch dtype)
DTYPES: Mapping[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I16": (2, "int16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "F32": (4, "float32"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
}

_MAX_LISTED = 10
_INDEX_SUFFIX = ".safetensors.index.json"
# Shards as transformers and diffusers number them
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True)
class TensorInfo:
    """A header's entry: the file's name for the dtype, the shape, and the byte range relative to `data_start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file; `data_start` is the file offset of the first tensor byte."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises `HyimgError` for a missing path, a folder, a pickle, a file of another format, and a file whose size does
    not match its header.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise HyimgError(f"`{path}` is a folder, not a safetensors file", hint="give a file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer forever
            raise HyimgError(f"`{path}` is a device or a pipe, not a safetensors file")
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            _refuse_foreign(path, start, file_size)
            header_bytes = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(header_bytes)
    except FileNotFoundError:
        raise HyimgError(f"there is no file `{path}`") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be the name of a file"
        raise HyimgError(f"`{path}` cannot be read: {reason}") from None
    tensors, metadata = _parse_header(path, text)
    data_start = 8 + header_bytes
    _check_layout(path, tensors, file_size - data_start, data_start)
    return Header(path, tensors, metadata, data_start)


def require_header_size(num_bytes: int, metadata: Mapping[str, str], path: Path) -> None:
    """Raises `HyimgError` if a header of `num_bytes`, to be written to `path`, exceeds the format's limit."""
    if num_bytes > MAX_HEADER_BYTES:
        longest = max(metadata, key=lambda key: len(metadata[key]), default=None)
        what = f", mostly for `{longest}` in the metadata" if longest is not None else ""
        raise HyimgError(
            f"the header of `{path}` would have {num_bytes} bytes, and a safetensors file holds "
            f"{MAX_HEADER_BYTES}{what}"
        )


def _refuse_foreign(path: Path, start: bytes, file_size: int) -> None:
    """Refuses files of other formats by their first bytes; recognises pickles and git LFS pointers."""
    if start[:8].startswith(b"version ") and b"git-lfs" in start:
        raise HyimgError(
            f"`{path}` is a git LFS pointer, not the file itself",
            hint="fetch it with `git lfs pull`, or download the file again",
        )
    if start[8:9] == b"{":
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise HyimgError(
                f"`{path}` is not a safetensors file: its header would have {header_bytes} bytes"
            )
        if 8 + header_bytes > file_size:
            raise HyimgError(
                f"`{path}` is truncated: its header alone needs {8 + header_bytes} bytes and the file has "
                f"{file_size}",
                hint="copy or download it again",
            )
        return
    is_pickle = start.startswith(b"PK\x03\x04") or (
        start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"
    )
    if is_pickle or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise HyimgError(
            f"`{path}` is a pickle, which can run any code when opened; only safetensors files are read",
            hint="download the safetensors release of this model, or convert the file if you trust it",
        )
    if file_size < 8:
        raise HyimgError(
            f"`{path}` is not a safetensors file: it has only {file_size} bytes",
            hint="copy or download it again",
        )
    raise HyimgError(f"`{path}` is not a safetensors file")


def _parse_header(path: Path, text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header: dict[str, Any] = parse_json(text, "its header")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise HyimgError("its `__metadata__` is not a table of texts")
        tensors = {name: _tensor_info(name, entry) for name, entry in header.items()}
    except HyimgError as error:
        raise HyimgError(f"`{path}` is not a safetensors file: {error.message}") from None
    return tensors, metadata


def _tensor_info(name: str, entry: object) -> TensorInfo:
    """An entry of a header. Raises HyimgError, as a predicate of the file, for one with other parts or types."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if all(
            type(number) is int for number in (*shape, start, end)
        ):
            if len(shape) > MAX_DIMENSIONS:
                raise HyimgError(f"`{name}` has {len(shape)} dimensions, over {MAX_DIMENSIONS}")
            # a size of zero would hide any others from the comparison with the offsets
            if math.prod(abs(size) or 1 for size in shape) >= 2**63:
                raise HyimgError(f"the shape of `{name}` is larger than any tensor")
            return TensorInfo(dtype, tuple(shape), start, end)
    raise HyimgError(f"the header's entry of `{name}` is not a dtype, a shape and two offsets")


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int, data_start: int) -> None:
    """Tensors must fill the data without holes or overlap, and the file must hold all of it."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        size = DTYPES[info.dtype][0] if info.dtype in DTYPES else None
        misfit = size is not None and math.prod(info.shape) * size != info.end - info.start
        if info.start != position or info.end < info.start or misfit or any(n < 0 for n in info.shape):
            raise HyimgError(
                f"`{path}` is damaged: the header's offsets of `{name}` do not fit its shape and neighbours"
            )
        position = info.end
    if position > data_bytes:
        raise HyimgError(
            f"`{path}` is truncated: according to its header it has {data_start + position} bytes, and the file has "
            f"{data_start + data_bytes}",
            hint="copy or download it again",
        )
    if position < data_bytes:
        raise HyimgError(
            f"`{path}` is damaged: it has {data_start + data_bytes} bytes, and according to its header "
            f"{data_start + position}"
        )


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one safetensors file, or of a sharded folder as if it were one file.

    `use_mmap=False` reads the bytes instead of mapping them: slower to start, kinder to network drives.
    """

    path: Path
    headers: tuple[Header, ...]
    use_mmap: bool = True

    @staticmethod
    def open(path: str | os.PathLike[str], *, mmap: bool = True) -> Checkpoint:
        """Opens a file, or a folder with one `*.safetensors.index.json` or one `*.safetensors`.

        Raises `HyimgError` as `read_header`, for a folder with several, for a part of a sharded checkpoint, and for
        shards and an index that do not belong together.
        """
        path = Path(path)
        if not path.is_dir():
            _refuse_part(path)
            return Checkpoint(path, (read_header(path),), mmap)
        indexes = sorted(path.glob(f"*{_INDEX_SUFFIX}"))
        if len(indexes) == 1:
            return Checkpoint(path, _read_shards(indexes[0]), mmap)
        files = sorted(path.glob("*.safetensors"))
        if not indexes and len(files) == 1:
            return Checkpoint(path, (read_header(files[0]),), mmap)
        raise HyimgError(
            f"folder `{path}` has {len(indexes)} index files and {len(files)} safetensors files",
            hint="give a folder with one `*.safetensors.index.json` or one `*.safetensors`, or the file",
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the tensors."""
        return tuple(header.path for header in self.headers)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its `unwrapped` name; offsets are relative to the data of its file.

        Raises `HyimgError` for two tensors of the same name.
        """
        tensors: dict[str, TensorInfo] = {}
        for header in self.headers:
            for name, info in header.tensors.items():
                if tensors.setdefault(unwrapped(name), info) is not info:
                    raise HyimgError(f"`{header.path}` holds `{unwrapped(name)}` twice, once as `{name}`")
        return tensors

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The merged metadata of all files."""
        return {key: value for header in self.headers for key, value in header.metadata.items()}

    @cached_property
    def _header_of(self) -> Mapping[str, Header]:
        return {unwrapped(name): header for header in self.headers for name in header.tensors}

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        return {}

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """One tensor on `device`, in the file's dtype and shape.

        A mapped tensor on the CPU shares the file's pages copy-on-write: writes never reach the file. Raises
        `HyimgError` for a dtype that torch does not have.
        """
        import torch

        header, info = self._header_of[name], self.tensors[name]
        if info.dtype not in DTYPES:
            raise HyimgError(
                f"`{name}` in `{header.path}` has the dtype {info.dtype}, which is not supported"
            )
        dtype: torch.dtype = getattr(torch, DTYPES[info.dtype][1])
        if info.start == info.end:
            return torch.empty(info.shape, dtype=dtype, device=device)
        position, num_bytes = header.data_start + info.start, info.end - info.start
        if self.use_mmap:
            raw = torch.frombuffer(
                self._map(header.path), dtype=torch.uint8, count=num_bytes, offset=position
            )
        else:
            raw = torch.frombuffer(_read_bytes(header.path, position, num_bytes), dtype=torch.uint8)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape).to(device)

    def read_bytes(self, name: str) -> bytes:
        """The bytes of one tensor in the file, without torch."""
        header, info = self._header_of[name], self.tensors[name]
        return bytes(_read_bytes(header.path, header.data_start + info.start, info.end - info.start))

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                self._maps[path] = _map_privately(path)
            except OSError as error:
                raise RunError(
                    f"`{path}` cannot be mapped into memory: {error.strerror or error}",
                    hint="use `--disable_mmap_load_safetensors`",
                ) from None
        return self._maps[path]


def _map_privately(path: Path) -> mmap.mmap:
    """Maps a file copy-on-write without reserving memory: the file may be larger than memory."""
    with path.open("rb") as file:
        if sys.platform == "win32":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # MAP_NORESERVE, which Python names only from 3.13 on
        no_reserve = 0x4000 if sys.platform == "linux" else 0
        return mmap.mmap(
            file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | no_reserve,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )


def _read_bytes(path: Path, position: int, num_bytes: int) -> bytearray:
    buffer = bytearray(num_bytes)
    with path.open("rb") as file:
        file.seek(position)
        # For a regular file, readinto returns fewer bytes only at the end
        if file.readinto(buffer) != num_bytes:
            raise HyimgError(f"`{path}` was truncated while it was read")
    return buffer


def _refuse_part(path: Path) -> None:
    """Raises HyimgError for a path that is named like a part of a sharded checkpoint."""
    shard = _SHARD.search(path.name)
    if path.name.endswith(_INDEX_SUFFIX):
        what = "the index of a sharded checkpoint"
    elif shard is not None and int(shard[1]) > 1:
        what = f"one of {int(shard[1])} shards"
    else:
        return
    raise HyimgError(f"`{path}` is {what}, not all of it", hint=f"give its folder, `{path.parent}`")


def _read_shards(index: Path) -> tuple[Header, ...]:
    """The shards that an index names; raises HyimgError unless they hold exactly the tensors it lists."""
    shard_of = _read_weight_map(index)
    names = sorted(set(shard_of.values()))
    absent = [
        name for name in names if not os.path.exists(index.parent / name)
    ]  # not Path.exists, which raises for a name that is too long
    if absent:
        raise HyimgError(
            f"{len(absent)} of {len(names)} files in `{index}` are missing: {_listed(absent)}",
            hint="download them to the same folder",
        )
    headers = tuple(read_header(index.parent / name) for name in names)
    problems = []
    found = {tensor for header in headers for tensor in header.tensors}
    problems += [f"`{tensor}` is in no file" for tensor in shard_of if tensor not in found]
    for file_name, header in zip(names, headers, strict=True):
        for tensor in header.tensors:
            if shard_of.get(tensor) != file_name:
                where = f"`{shard_of[tensor]}`" if tensor in shard_of else "no file"
                problems.append(f"`{tensor}` is in `{file_name}`, but in {where} according to the index")
    if problems:
        raise HyimgError(
            f"`{index}` does not match the files next to it: {_listed(problems, quoted=False)}",
            hint="download the folder again, including the index",
        )
    return headers


def _read_weight_map(index: Path) -> dict[str, str]:
    """Maps tensors to file names, as in an index."""
    try:
        document = parse_json(read_bounded(index, MAX_HEADER_BYTES), "it")
        weight_map: dict[str, str] = document.get("weight_map", {})
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError
        if not all(name and Path(name).name == name for name in weight_map.values()):  # to no other folder
            raise ValueError
    except OSError as error:
        raise HyimgError(f"the safetensors index `{index}` cannot be read: {error.strerror}") from None
    except (HyimgError, ValueError, AttributeError):
        raise HyimgError(f"`{index}` is not a safetensors index: it has no readable `weight_map`") from None
    return weight_map


def _listed(texts: Sequence[str], *, quoted: bool = True) -> str:
    """The first few texts, and the number of the others."""
    shown = [f"`{text}`" if quoted else text for text in texts]
    return first_few(shown, limit=_MAX_LISTED, separator=", " if quoted else "; ")
