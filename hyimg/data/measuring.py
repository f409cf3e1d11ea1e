"""Content hash and size of image files: read once and remembered, so that a warm start reads none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hyimg.cache.identity import FileStat, hash_bytes
from hyimg.cache.index import Index
from hyimg.data.buckets import Size
from hyimg.data.images import probe

_MOST_THREADS = 8


class Measured(NamedTuple):
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
    measured = _recall(dict.fromkeys(paths), index)
    bad: dict[Path, str] = {}
    unknown = [path for path in dict.fromkeys(paths) if path not in measured]
    if progress is not None:
        progress(len(measured))
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


def _recall(paths: Iterable[Path], index: Index) -> dict[Path, Measured]:
    """Those of `paths` that the index knows, untouched since they were read."""
    by_name = {_index_name(path): path for path in paths}
    recalled: dict[Path, Measured] = {}
    for name, (stat, sha256, size) in index.images(list(by_name)).items():
        with contextlib.suppress(OSError):
            if FileStat.of(os.stat(by_name[name])) == stat:
                recalled[by_name[name]] = Measured(sha256, size)
    return recalled


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
