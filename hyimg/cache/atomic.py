"""Atomic writes, and a lock file.

Everything the program leaves on disk is written to a temporary name in the same folder, flushed to the disk, and
renamed. A reader, or a run killed at any moment, sees the old file or the new one, and several processes may write
one destination (the last one wins).

    with atomic_path(run_dir / "NAME.safetensors", root=run_dir) as temporary:
        save_file(state, temporary)

`root` is the folder that the user gave; below it no link is followed (`hyimg.cache.own_files`). Without it the user
gave `dst` itself, and a link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hyimg.cache.own_files import (
    RENAMES_OPEN_FILES,
    create_temporary,
    is_link,
    make_folder,
    remove_leftovers,
    temporary_stem,
    try_lock,
)
from hyimg.cache.own_files import TEMPORARY_SUFFIX as TEMPORARY_SUFFIX
from hyimg.cache.own_files import temporary_name as temporary_name
from hyimg.cache.own_files import temporary_of as temporary_of
from hyimg.errors import HyimgError, RunError

# Of one name, in common file systems
_MAX_NAME_BYTES = 255
_TRIAL = ".write-test"
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ROOM = (*_DISK_IS_FULL, errno.EFBIG)
"""Error numbers of a write for lack of space."""


class FileIsThereError(HyimgError):
    """A new file's name is taken."""


class WriteError(RunError):
    """A write that failed for its circumstances: a full disk, a limit, a removed folder.

    `remedy` is what to do before running the command again, if that is known.
    """

    def __init__(self, message: str, *, hint: str | None = None, remedy: str | None = None) -> None:
        first = f"{remedy}, or choose a folder on another disk, and " if remedy is not None else ""
        super().__init__(message, hint=hint or f"{first}run the same command again")
        self.remedy = remedy


@contextlib.contextmanager
def atomic_path(
    dst: Path | str,
    *,
    root: Path | str | None = None,
    durable: bool = True,
    replace: bool = True,
    clean: bool = True,
    verify: Callable[[Path], object] | None = None,
) -> Iterator[Path]:
    """A temporary path of an empty file to write; on exit it is flushed and becomes `dst`, on failure it is removed.

    Missing parent folders are created. Below `root` a link in place of a folder is an error and one in place of the
    file is replaced; without `root` a link is followed. `durable=False` skips the flush, for files with a checksum
    that are cheap to make again (a power cut may truncate them). `replace=False` raises `FileIsThereError` if `dst`
    exists, even if it was created meanwhile. `clean` first removes temporary files of `dst` that killed runs left,
    which lists the folder. `verify` is called with the written file before it becomes `dst` (`read_header` for
    safetensors, so that every saved file can be opened); if it raises, `dst` is unchanged.

    Raises `HyimgError` if the folder cannot be written or `dst` is not a file (a folder, device, pipe, or below `root`
    a link to a folder), `RunError` if the disk is full or `verify` raises a `HyimgError`.
    """
    dst = _destination(Path(dst), follow=root is None)
    temporary, descriptor = dst, None
    try:
        make_folder(dst.parent, root=dst.parent if root is None else root)
        if clean:
            remove_leftovers(dst.parent, {temporary_stem(dst.name)}.__contains__, root=dst.parent)
        temporary, descriptor = create_temporary(dst)
        yield temporary
        if verify is not None:
            _verify(verify, temporary, dst)
        if durable:
            _flush(temporary)
        if not RENAMES_OPEN_FILES:
            os.close(descriptor)
            descriptor = None
        # open and so locked until it is renamed, or another run could remove it as a leftover
        if replace:
            os.replace(temporary, dst)
            temporary = dst
        else:
            _place(temporary, dst)
        if durable:
            flush_folder(dst.parent)
    except OSError as error:
        raise explain_write(error, dst, temporary) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if temporary != dst:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def atomic_write_bytes(
    dst: Path | str,
    data: bytes,
    *,
    root: Path | str | None = None,
    durable: bool = True,
    replace: bool = True,
    verify: Callable[[Path], object] | None = None,
) -> None:
    """Writes `data` to the file `dst`; arguments and errors as for `atomic_path`."""
    with atomic_path(dst, root=root, durable=durable, replace=replace, verify=verify) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(
    dst: Path | str, text: str, *, root: Path | str | None = None, durable: bool = True
) -> None:
    """Writes `text` (UTF-8, line ends unchanged) to the file `dst`; raises as `atomic_path`."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise HyimgError(f"the text for `{dst}` cannot be written as UTF-8: {error}") from error
    atomic_write_bytes(dst, data, root=root, durable=durable)


def require_writable_folder(folder: Path | str) -> Path:
    """Returns `folder` if files can be written in it, for a check before long work.

    If the folder does not exist, its nearest existing parent is tried; nothing is left behind. Raises `HyimgError` if
    files cannot be written.
    """
    folder = Path(folder)
    try:
        first = _first_folder(folder.absolute())
        remove_leftovers(first, {_TRIAL}.__contains__, root=first)
        trial, descriptor = create_temporary(first / _TRIAL)
        os.close(descriptor)
        trial.unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot write in the folder `{folder}`: {error.strerror}"
        if error.errno in _DISK_IS_FULL:
            raise WriteError(message, remedy="free some space") from error
        raise HyimgError(message, hint="choose another folder") from error
    except ValueError as error:
        raise HyimgError(f"`{folder}` cannot be the name of a folder") from error
    return folder


def require_file_name(path: Path | str) -> None:
    """Raises `HyimgError` if `path` cannot be a file: something else has that name, or it is too long."""
    _destination(Path(path))


def _first_folder(path: Path) -> Path:
    """`path`, or its nearest existing parent. Raises OSError if it is not a folder or a name is too long."""
    if any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    first = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not first.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return first


def _destination(dst: Path, *, follow: bool = True) -> Path:
    """The file to replace: a link's target with `follow`, else the link. Raises HyimgError if it is not a file."""
    try:
        if not follow and is_link(dst):
            return dst
        target = Path(os.path.realpath(dst)) if dst.is_symlink() else dst
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise explain_write(error, dst, dst) from error
    except ValueError as error:  # a NUL character or a lone surrogate
        raise HyimgError(f"`{dst}` cannot be the name of a file", hint="choose another name") from error
    if stat.S_ISDIR(mode):
        raise HyimgError(
            f"cannot write `{dst}`: it is a folder", hint="choose another name, or remove the folder"
        )
    if not stat.S_ISREG(mode):
        raise HyimgError(f"cannot write `{dst}`: it is a device or a pipe", hint="give the name of a file")
    return target


def _place(temporary: Path, dst: Path) -> None:
    """Renames a finished file unless the name is taken."""
    try:
        os.link(temporary, dst)
    except OSError as error:
        if os.path.lexists(dst):
            raise FileIsThereError(f"`{dst}` exists", hint="choose another name") from error
        os.replace(temporary, dst)  # a file system without hard links


def _verify(verify: Callable[[Path], object], temporary: Path, dst: Path) -> None:
    try:
        verify(temporary)
    except HyimgError as error:
        raise RunError(
            f"`{dst}` was not saved, because it could not be read again: "
            + error.message.replace(str(temporary), dst.name)
        ) from error


def _flush(path: Path) -> None:
    # Windows flushes only handles that are open for writing
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, if the system supports it (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def explain_write(error: OSError, dst: Path, temporary: Path) -> HyimgError:
    """The error for a failed write, or for another file that could not be read meanwhile."""
    what = f"`{dst.name}` could not be written in `{dst.parent}`"
    if error.errno in _DISK_IS_FULL:
        return WriteError(f"the disk is full: {what}", remedy="free some space")
    if error.errno == errno.EFBIG:
        return WriteError(f"{what}: it is larger than a file may be", remedy="raise the limit (`ulimit -f`)")
    if error.errno == errno.ENOENT and not dst.parent.is_dir():
        return WriteError(f"{what}: the folder was removed")
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
    return WriteError(f"cannot write `{dst.name}` in `{dst.parent}`: {reason}")


@contextmanager
def sole_process(path: Path, busy: HyimgError, *, root: Path | str | None = None) -> Iterator[None]:
    """Holds the lock file `path` in the block; raises `busy` if another process holds it.

    The file's folder is created, and the file is removed at the end. A file that a killed process left does not block,
    nor does another user's if it may be removed. `root` as for `atomic_path`.

    Raises `HyimgError` if the file is a link or a folder, and if it cannot be locked.
    """
    try:
        make_folder(path.parent, root=path.parent if root is None else root)
        lock = _acquired(path, busy)
    except OSError as error:
        raise HyimgError(
            f"cannot lock `{path}`: {error.strerror or error}{_owner(path)}",
            hint="remove the file if no process uses it, or choose another folder",
        ) from error
    try:
        yield
    finally:
        # unlinked while it is held, so that no two processes can lock the old and the new file
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def _acquired(path: Path, busy: HyimgError) -> FileLock:
    _require_lock_file(path)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except PermissionError:
            if not _remove_stale(path, busy):
                raise
            lock.acquire(timeout=0)
    except Timeout as error:
        raise busy from error
    except NotImplementedError as error:
        raise HyimgError(
            f"cannot lock `{path}`: its file system has no locks", hint="choose a folder on another disk"
        ) from error
    return lock


def _require_lock_file(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no file"
        raise HyimgError(f"`{path}` is {kind}, and a lock file belongs there", hint="remove it")


def _remove_stale(path: Path, busy: HyimgError) -> bool:
    """Removes a lock file that may be read but not written, unless a process holds it; whether that worked."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            locked = try_lock(descriptor)
            if locked:
                path.unlink()
                return True
        finally:
            os.close(descriptor)
        if locked is False:
            raise busy
    return False


def _owner(path: Path) -> str:
    """A remark if the file belongs to another user."""
    with suppress(OSError, AttributeError, KeyError, NotImplementedError):
        if path.lstat().st_uid != os.geteuid():
            return f" (it belongs to the user `{path.owner()}`)"
    return ""
