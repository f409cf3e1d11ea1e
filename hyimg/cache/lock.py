"""One process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hyimg.errors import HyimgError


@contextmanager
def sole_process(path: Path, busy: HyimgError) -> Iterator[None]:
    """The time in which no other process holds the lock file `path`; raises `busy` where one does.

    The file's folder is made, and the file is removed at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise busy from error
    try:
        yield
    finally:
        # unlinked while it is held, so that nobody can hold the old file and another the new one
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()
