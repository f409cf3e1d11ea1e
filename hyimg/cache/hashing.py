"""Content hashes of files, which cache keys are made of.

A 16 GB checkpoint is hashed once: the hash is remembered by (path, size, mtime, inode), so only an edited or replaced
file is hashed again.
"""

from __future__ import annotations

import hashlib
import os
import stat as stat_module
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from hyimg.errors import HyimgError

_CHUNK_BYTES = 1 << 22
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 1 << 14
_MODEL_SUFFIXES = (".safetensors", ".json")


class FileStat(NamedTuple):
    """What shows without reading a file whether it was edited."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileStat:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def is_settled(self) -> bool:
        """Whether a later edit will change `mtime_ns`; false for a file changed within the last clock tick.

        A whole number of seconds suggests a file system with that resolution (two seconds at worst); the others use
        the kernel's clock, which ticks at least every 10 ms.
        """
        window_ns = 2_000_000_000 if self.mtime_ns % 1_000_000_000 == 0 else 20_000_000
        return time.time_ns() - self.mtime_ns > window_ns


class Memo(Protocol):
    """Remembers content hashes: `hyimg.cache.index.Index`, or a dictionary in tests."""

    def content_hash(self, path: str, stat: FileStat) -> str | None: ...

    def remember_content_hash(self, path: str, stat: FileStat, sha256: str) -> None: ...


def hash_bytes(data: bytes) -> str:
    """sha256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_identity(
    path: Path | str, memo: Memo | None = None, *, progress: Callable[[int], None] | None = None
) -> str:
    """sha256 of a file's content, or of a model folder's `.safetensors` and `.json` files; 64 hex digits.

    `memo` remembers the hash of each file; `progress` is called with the bytes read since its last call.
    Raises `HyimgError` if the path is missing, unreadable, or a folder without model files.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder_identity(path, memo, progress)
        return _remembered_hash(path, memo, progress)
    except OSError as error:
        raise HyimgError(f"cannot read `{path}`: {error.strerror or error}") from error


def fingerprint(path: Path | str) -> str:
    """A quick hash of a model file or folder, from its size and samples of its bytes; 16 hex digits.

    Takes milliseconds where `file_identity` takes a minute. Different checkpoints get different fingerprints, but equal
    fingerprints do not prove equal content. Raises as `file_identity`.
    """
    path = Path(path)
    try:
        if path.is_dir():
            listing = "".join(f"{p.name}\0{_sampled_hash(p)}\n" for p in _model_files(path))
            return hash_bytes(listing.encode())[:16]
        return _sampled_hash(path)[:16]
    except OSError as error:
        raise HyimgError(f"cannot read `{path}`: {error.strerror or error}") from error


def _sampled_hash(path: Path) -> str:
    """sha256 of the size and of evenly spaced samples, the first at the start of the file."""
    size = os.stat(path).st_size
    digest = hashlib.sha256(f"{size}".encode())
    with open(path, "rb", buffering=0) as file:
        for number in range(_NUM_SAMPLES):
            file.seek(size * number // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _folder_identity(folder: Path, memo: Memo | None, progress: Callable[[int], None] | None) -> str:
    paths = _model_files(folder)
    listing = "".join(f"{p.name}\0{_remembered_hash(p, memo, progress)}\n" for p in paths)
    return hash_bytes(listing.encode())


def _model_files(folder: Path) -> list[Path]:
    # not subfolders: they contain caches and alternatives, which are not read
    paths = sorted(p for p in folder.iterdir() if p.suffix in _MODEL_SUFFIXES and p.is_file())
    if not paths:
        raise HyimgError(f"the folder `{folder}` holds no `.safetensors` or `.json` file")
    return paths


def _remembered_hash(path: Path, memo: Memo | None, progress: Callable[[int], None] | None) -> str:
    name = os.path.abspath(path)
    status = os.stat(path)
    if not stat_module.S_ISREG(status.st_mode):
        raise HyimgError(f"`{path}` is neither a file nor a folder, but a device or a pipe")
    stat = FileStat.of(status)
    if memo is not None and (known := memo.content_hash(name, stat)) is not None:
        return known
    sha256 = _read_hash(path, progress)
    # not remembered if it changed meanwhile, or may still change without a new mtime
    if memo is not None and stat.is_settled() and FileStat.of(os.stat(path)) == stat:
        memo.remember_content_hash(name, stat, sha256)
    return sha256


def _read_hash(path: Path, progress: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()
