"""Safetensors files without the safetensors library: headers, one tensor at a time, sharded folders.

Reading the header alone (no torch import) lets every command look at a 35 GB file in milliseconds and find
what is wrong with it before the first weight is read. Layout of the format: an 8-byte little-endian header
length, a JSON header, the tensor bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hyimg.errors import HyimgError

if TYPE_CHECKING:
    import torch

Kind = Literal["dit", "vae", "qwen", "byt5", "lora", "unknown"]

# The format itself refuses longer headers
MAX_HEADER_BYTES = 100_000_000

# name in the file -> (bytes a value, name of the torch dtype)
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
    """One entry of a header: dtype as the file names it, shape, and its bytes relative to `data_start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself; `data_start` is the file offset of the first tensor byte."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises `HyimgError` for a path that is missing or a folder, a pickle, a file that is not safetensors, and
    a file whose size is not what its header tells.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise HyimgError(f"`{path}` is a folder, not a safetensors file", hint="name a file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer for ever
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


def _refuse_foreign(path: Path, start: bytes, file_size: int) -> None:
    """Refuses what is not safetensors from its first bytes, telling pickles and git LFS pointers apart."""
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
            hint="download the safetensors release of this model, or convert the file where you trust it",
        )
    if file_size < 8:
        raise HyimgError(
            f"`{path}` is not a safetensors file: it has only {file_size} bytes",
            hint="copy or download it again",
        )
    raise HyimgError(f"`{path}` is not a safetensors file")


def _parse_header(path: Path, text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors = {
            name: TensorInfo(
                str(entry["dtype"]),
                tuple(int(size) for size in entry["shape"]),
                int(entry["data_offsets"][0]),
                int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise HyimgError(f"`{path}` is not a safetensors file: its header cannot be parsed") from None
    return tensors, metadata


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
            f"`{path}` is truncated: its header tells of {data_start + position} bytes and the file has "
            f"{data_start + data_bytes}",
            hint="copy or download it again",
        )
    if position < data_bytes:
        raise HyimgError(
            f"`{path}` is damaged: it has {data_start + data_bytes} bytes and its header tells of "
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
        """Every tensor by name; offsets are relative to the data of the file that holds it."""
        return {name: info for header in self.headers for name, info in header.tensors.items()}

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of all files together."""
        return {key: value for header in self.headers for key, value in header.metadata.items()}

    @cached_property
    def _header_of(self) -> Mapping[str, Header]:
        return {name: header for header in self.headers for name in header.tensors}

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        return {}

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """One tensor on `device`, in the file's dtype.

        A mapped tensor on the CPU shares the file's pages: copy-on-write, so that nothing written to it
        reaches the file. Raises `HyimgError` for a dtype that torch does not have.
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
        """The bytes of one tensor as the file has them; no torch."""
        header, info = self._header_of[name], self.tensors[name]
        return bytes(_read_bytes(header.path, header.data_start + info.start, info.end - info.start))

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                self._maps[path] = _map_privately(path)
            except OSError as error:
                raise HyimgError(
                    f"`{path}` cannot be mapped into memory: {error.strerror or error}",
                    hint="use `--disable_mmap_load_safetensors`",
                ) from None
        return self._maps[path]


def _map_privately(path: Path) -> mmap.mmap:
    """Maps a file copy-on-write, setting no memory aside: the file may be larger than memory."""
    with path.open("rb") as file:
        if sys.platform == "win32":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # Python names the flag from 3.13 on only
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
        # readinto of a plain file returns fewer bytes only at the file's end
        if file.readinto(buffer) != num_bytes:
            raise HyimgError(f"`{path}` became shorter while it was read")
    return buffer


def _refuse_part(path: Path) -> None:
    """Raises HyimgError for what is a part of a sharded folder by its name."""
    shard = _SHARD.search(path.name)
    if path.name.endswith(_INDEX_SUFFIX):
        what = "the index of a sharded checkpoint"
    elif shard is not None and int(shard[1]) > 1:
        what = f"one of {int(shard[1])} shards"
    else:
        return
    raise HyimgError(f"`{path}` is {what}, not all of it", hint=f"give its folder, `{path.parent}`")


def _read_shards(index: Path) -> tuple[Header, ...]:
    """The shards that an index names. They and it must tell of the same tensors, each once."""
    shard_of = _read_weight_map(index)
    names = sorted(set(shard_of.values()))
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        raise HyimgError(
            f"`{index}` names {len(absent)} of {len(names)} files that are not there: {_listed(absent)}",
            hint="download them into the same folder",
        )
    headers = tuple(read_header(index.parent / name) for name in names)
    problems = []
    found = {tensor for header in headers for tensor in header.tensors}
    problems += [f"`{tensor}` is in none of them" for tensor in shard_of if tensor not in found]
    for file_name, header in zip(names, headers, strict=True):
        for tensor in header.tensors:
            if shard_of.get(tensor) != file_name:
                where = f"`{shard_of[tensor]}`" if tensor in shard_of else "no file"
                problems.append(f"`{tensor}` is in `{file_name}`, and in {where} by the index")
    if problems:
        raise HyimgError(
            f"`{index}` and the files beside it do not belong together: {_listed(problems, quoted=False)}",
            hint="download the folder again, index included",
        )
    return headers


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index tells it."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(name, str) and name for name in weight_map.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HyimgError(f"`{index}` is not a safetensors index: it has no readable `weight_map`") from None
    return weight_map


def _listed(texts: Sequence[str], *, quoted: bool = True) -> str:
    """The first few, and how many more there are."""
    shown = [f"`{text}`" if quoted else text for text in texts[:_MAX_LISTED]]
    more = len(texts) - len(shown)
    return (", " if quoted else "; ").join(shown) + (f" and {more} more" if more else "")


# What a name of this kind of file contains and no other's does; the first kind that fits is taken
_MARKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (
        "lora",
        (".lora_down.", ".lora_up.", ".lora_A", ".lora_B", "lora.down.", "lora.up.", ".hada_w1_", ".lokr_w1"),
    ),
    ("dit", ("double_blocks.", "single_blocks.", "single_transformer_blocks.")),
    ("vae", ("encoder.down", "decoder.up", "decoder.mid")),
    ("byt5", ("encoder.block.",)),
    ("qwen", ("layers.0.self_attn.q_proj.",)),
)

KIND_NAMES: Mapping[Kind, str] = {
    "dit": "a diffusion transformer (DiT)",
    "vae": "a VAE",
    "qwen": "a Qwen2.5-VL text encoder",
    "byt5": "a byT5 text encoder",
    "lora": "a LoRA",
    "unknown": "a file of a kind that is not known here",
}


def identify(names: Iterable[str]) -> Kind:
    """The kind of model that has tensors of these names, so that "a VAE given as DiT" is one sentence."""
    names = list(names)
    for kind, marks in _MARKS:
        if any(mark in name for name in names for mark in marks):
            return kind
    return "unknown"
