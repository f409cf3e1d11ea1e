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
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from hyimg.config.names import printable
from hyimg.errors import HyimgError, RunError

TEMPORARY_SUFFIX = ".hyimg-tmp"
"""How a temporary file's name ends; one that a killed run left behind may be removed by anyone."""

# Of the destination's name in the temporary one, which must not be too long where the other is not
_NAME_CHARS = 48
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))
# Of one name, in common file systems
_MAX_NAME_BYTES = 255


class FileIsThereError(HyimgError):
    """Another file has the name that a new one was to get."""


@contextlib.contextmanager
def atomic_path(dst: Path | str, *, durable: bool = True, replace: bool = True) -> Iterator[Path]:
    """A temporary path to write; on leaving, it is flushed and becomes `dst`. On failure it is removed.

    Missing parent folders are made, and a symbolic link is followed, so that its target is what changes.
    `durable=False` leaves out the flush to the disk, for files that a checksum guards and that cost little to
    make again (after a power cut they may be cut short). `replace=False` leaves a file that is there as it is, whoever
    made it and when, and raises `FileIsThereError`.

    Raises `HyimgError` where the folder cannot be written or something that is no file is in the place (a
    folder, a device, a pipe), `RunError` where the disk is full.
    """
    dst = _destination(Path(dst))
    temporary = dst.with_name(temporary_name(dst.name))
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _flush(temporary)
        if replace:
            os.replace(temporary, dst)
        else:
            _place(temporary, dst)
        if durable:
            flush_folder(dst.parent)
    except OSError as error:
        raise _explain(error, dst, temporary) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """A fresh name, in the same folder, for what is to become `name`."""
    return f".{name[:_NAME_CHARS]}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"


def temporary_of(name: str) -> str | None:
    """Which file a temporary name was to become (its first 48 characters), or None for another name."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found is not None else None


def atomic_write_bytes(dst: Path | str, data: bytes, *, durable: bool = True, replace: bool = True) -> None:
    """Writes `data` as the whole file `dst`; raises as `atomic_path`."""
    with atomic_path(dst, durable=durable, replace=replace) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(dst: Path | str, text: str, *, durable: bool = True) -> None:
    """Writes `text` (UTF-8, line ends untouched) as the whole file `dst`; raises as `atomic_path`."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise HyimgError(
            f"the text for `{dst}` cannot be written as UTF-8: {printable(str(error))}"
        ) from error
    atomic_write_bytes(dst, data, durable=durable)


def require_writable_folder(folder: Path | str) -> Path:
    """Finds out whether files can be written in `folder`, so that a run learns it before its long work.

    Where the folder is not there yet, the one that it would be made in is tried: nothing is left behind.
    Raises `HyimgError` where files cannot be written.
    """
    folder = Path(folder)
    try:
        trial = _first_folder(folder.absolute()) / f".write-test{TEMPORARY_SUFFIX}"
        with atomic_path(trial) as temporary:
            temporary.write_bytes(b"")
        trial.unlink(missing_ok=True)
    except HyimgError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.message
        raise type(error)(f"cannot write in the folder `{folder}`: {reason}", hint=error.hint) from error
    except OSError as error:
        raise HyimgError(
            f"cannot write in the folder `{folder}`: {error.strerror}", hint="choose another folder"
        ) from error
    except ValueError as error:
        raise HyimgError(f"`{printable(str(folder))}` cannot be the name of a folder") from error
    return folder


def require_file_name(path: Path | str) -> None:
    """Raises `HyimgError` where no file can be: something else is in the place, or the name is too long."""
    _destination(Path(path))


def _first_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there. Raises OSError where nothing can be made in it."""
    if any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    first = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not first.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return first


def _destination(dst: Path) -> Path:
    """The file to replace: the end of a symbolic link. Refuses what a file must not take the place of."""
    try:
        target = Path(os.path.realpath(dst)) if dst.is_symlink() else dst
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise _explain(error, dst, dst) from error
    except ValueError as error:  # a zero byte, or half a surrogate pair that no file system takes
        raise HyimgError(
            f"`{printable(str(dst))}` cannot be the name of a file", hint="choose another name"
        ) from error
    if stat.S_ISDIR(mode):
        raise HyimgError(
            f"cannot write `{dst}`: it is a folder", hint="choose another name, or remove the folder"
        )
    if not stat.S_ISREG(mode):
        raise HyimgError(f"cannot write `{dst}`: it is a device or a pipe", hint="give the name of a file")
    return target


def _place(temporary: Path, dst: Path) -> None:
    """Gives a finished file its name, which none may have."""
    try:
        os.link(temporary, dst)
    except OSError as error:
        if os.path.lexists(dst):
            raise FileIsThereError(f"`{dst}` exists", hint="choose another name") from error
        os.replace(temporary, dst)  # a file system without hard links


def _flush(path: Path) -> None:
    # Windows flushes only handles that are open for writing
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where the system can (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(error: OSError, dst: Path, temporary: Path) -> HyimgError:
    """The sentence for a failed write, or for a file that could not be read meanwhile."""
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
    if error.errno == errno.ENAMETOOLONG:
        return HyimgError(f"cannot write `{dst}`: the name is too long", hint="choose a shorter name")
    reason = error.strerror or str(error)
    other = error.filename
    if isinstance(other, str) and other not in (str(dst), str(temporary), str(dst.parent)):
        return HyimgError(f"`{dst}` was not written, because of `{other}`: {reason}")
    return HyimgError(f"cannot write `{dst.name}` in `{dst.parent}`: {reason}")
