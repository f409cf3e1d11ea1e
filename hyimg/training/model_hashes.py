"""The two hashes of a base model by which the web UIs' tools look it up, as the reference tool writes them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hyimg.cache.identity import FileStat, Memo

_WINDOW_START, _WINDOW_BYTES = 0x100000, 0x10000


def model_hashes(path: Path | None, memo: Memo) -> tuple[str | None, str | None]:
    """(old, new): 8 hexadecimal digits of the sha256 of 64 KiB from 1 MiB on, and the file's sha256.

    The second is told only where `memo` knows it, since reading 35 GB for it would take a minute; of a folder, or
    of no file, there is neither.
    """
    if path is None or not path.is_file():
        return None, None
    with path.open("rb") as file:
        file.seek(_WINDOW_START)
        window = file.read(_WINDOW_BYTES)
    known = memo.content_hash(os.path.abspath(path), FileStat.of(os.stat(path)))
    return hashlib.sha256(window).hexdigest()[:8], known
