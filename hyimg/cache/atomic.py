"""Files that appear whole or not at all.

Everything the program leaves on disk goes through here: it is written to a temporary name in the same
folder, flushed to the disk, and renamed. A reader, or a run killed at any moment, sees the old file or
the new one, and several processes may write one destination (the last one wins, whole).

    with atomic_path(run_dir / "NAME.safetensors") as temporary:
        save_file(state, temporary)
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from hyimg.errors import HyimgError, RunError

TEMPORARY_SUFFIX = ".hyimg-tmp"
"""How a temporary file's name ends; one that a killed run left behind may be removed by anyone."""


@contextlib.contextmanager
def atomic_path(dst: Path | str, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write; on leaving, it is flushed and becomes `dst`. On failure it is removed.

    Missing parent folders are made. `durable=False` leaves out the flush to the disk, for files that a
    checksum guards and that cost little to make again (after a power cut they may be cut short).

    Raises `HyimgError` where the folder cannot be written, `RunError` where the disk is full.
    """
    dst = Path(dst)
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _flush(temporary)
        os.replace(temporary, dst)
        if durable:
            _flush_folder(dst.parent)
    except OSError as error:
        if (told := _explain(error, dst)) is None:
            raise
        raise told from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(dst: Path | str, data: bytes, *, durable: bool = True) -> None:
    """Writes `data` as the whole file `dst`; raises as `atomic_path`."""
    with atomic_path(dst, durable=durable) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(dst: Path | str, text: str, *, durable: bool = True) -> None:
    """Writes `text` (UTF-8, line ends untouched) as the whole file `dst`; raises as `atomic_path`."""
    atomic_write_bytes(dst, text.encode(), durable=durable)


def require_writable_folder(folder: Path | str) -> Path:
    """Makes `folder` and tries a file in it, so that a run learns before its long work that it cannot save.

    Raises `HyimgError` where that fails.
    """
    folder = Path(folder)
    trial = folder / f".write-test{TEMPORARY_SUFFIX}"
    try:
        with atomic_path(trial) as temporary:
            temporary.write_bytes(b"")
    except HyimgError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.message
        raise type(error)(f"cannot write in the folder `{folder}`: {reason}", hint=error.hint) from error
    with contextlib.suppress(OSError):
        trial.unlink(missing_ok=True)
    return folder


def _flush(path: Path) -> None:
    # Windows flushes only handles that are open for writing
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where the system can (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(error: OSError, dst: Path) -> HyimgError | None:
    """The sentence for a failed write, or None where the trouble is of another kind."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"the disk is full: `{dst.name}` could not be written in `{dst.parent}`",
            hint="free some space, or choose another folder, and run the same command again",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HyimgError(
            f"cannot write `{dst.name}` in `{dst.parent}`: {error.strerror}",
            hint="choose a folder that you may write",
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return HyimgError(
            f"cannot write `{dst}`: something of another kind is in its place ({error.strerror})",
            hint="choose another name, or move what is there",
        )
    return None
