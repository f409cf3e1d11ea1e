"""What lies in the folder of a store: one look at each file, which a warm start of 100,000 samples is made of."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from hyimg.cache.atomic import TEMPORARY_SUFFIX

ENTRY_SUFFIX = ".safetensors"

EntryStat = tuple[int, int]
"""Size and mtime_ns of an entry's file: while they stay, a checksum that was right counts as right."""

_LEFTOVER_SECONDS = 3600.0


def list_entries(entries_folder: Path) -> dict[str, EntryStat]:
    """key -> size and mtime of every entry's file. Temporary files left by killed runs are removed."""
    found: dict[str, EntryStat] = {}
    for folder in _scan(entries_folder):
        if not folder.is_dir():
            continue
        for file in _scan(folder.path):
            # a file may vanish meanwhile: another process renames or removes it
            with contextlib.suppress(OSError):
                if file.name.endswith(ENTRY_SUFFIX):
                    stat = file.stat()
                    found[file.name[: -len(ENTRY_SUFFIX)]] = (stat.st_size, stat.st_mtime_ns)
                elif file.name.endswith(TEMPORARY_SUFFIX) and _is_leftover(file):
                    os.unlink(file.path)
    return found


def _is_leftover(file: os.DirEntry[str]) -> bool:
    # entries in the making are dated back by seconds only, so an hour is a killed run's
    return time.time() - file.stat().st_mtime > _LEFTOVER_SECONDS


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
