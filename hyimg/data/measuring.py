"""Content hash and size of image files: read once and remembered, so that a warm start reads none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.identity import FileStat, hash_bytes
from hyimg.cache.index import Index
from hyimg.data.buckets import Size
from hyimg.data.images import probe

_MOST_THREADS = 8


@dataclass(frozen=True)
class Measured:
    """A readable image: sha256 of its file, and (width, height) as seen."""

    sha256: str
    size: Size


def measure(
    paths: Iterable[Path], index: Index, progress: Callable[[int], None] | None = None
) -> tuple[dict[Path, Measured], dict[Path, str]]:
    """Measures images: what was measured, and of the others why they cannot be read.

    A file that the index knows is not opened. `progress` is called with the images settled since its last
    call.
    """
    measured: dict[Path, Measured] = {}
    bad: dict[Path, str] = {}
    unknown: list[Path] = []
    for path in dict.fromkeys(paths):
        if (known := _recall(path, index)) is None:
            unknown.append(path)
        else:
            measured[path] = known
            if progress is not None:
                progress(1)
    # reading waits for the disk and decoding releases the interpreter lock
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for path, result in zip(unknown, pool.map(lambda path: _read(path, index), unknown), strict=True):
            if isinstance(result, str):
                bad[path] = result
            else:
                measured[path] = result
            if progress is not None:
                progress(1)
    return measured, bad


def _recall(path: Path, index: Index) -> Measured | None:
    try:
        stat = FileStat.of(os.stat(path))
    except OSError:
        return None
    known = index.image(_index_name(path), stat)
    return None if known is None else Measured(*known)


def _read(path: Path, index: Index) -> Measured | str:
    try:
        stat = FileStat.of(os.stat(path))
        data = path.read_bytes()
        sha256 = hash_bytes(data)
        size = index.image_size(sha256)
        if size is None:
            size = probe(data)
            index.remember_image_size(sha256, size)
        # what changed while it was read, or may change within this tick of the clock, is not remembered
        if stat.is_settled() and FileStat.of(os.stat(path)) == stat:
            index.remember_content_hash(_index_name(path), stat, sha256)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return Measured(sha256, size)


def _index_name(path: Path) -> str:
    """The path as text that the index takes: a name that is not UTF-8 (an old archive's, say) is spelt out."""
    return str(path).encode("utf-8", "backslashreplace").decode()
