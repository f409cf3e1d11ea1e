"""Files below a folder that hyimg writes in, without following links out of it.

A path or `root` folder that the user gave may be a link and is followed. Below the root, a link in place of a folder is
an error that names it, and a link in place of a file is itself replaced or removed, not its target. So a folder from
somebody else cannot make hyimg write, rename, remove or list anything outside of it. (This does not protect against
someone who changes the folder while hyimg writes in it.)

    make_folder(out / "comfy", root=out)
    for entry in list_folder(out / "comfy", root=out): ...

Temporary files have unpredictable names, are created with `O_EXCL`, and stay locked while they are written, so a later
run can recognise and remove those that a killed process left (`remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hyimg.errors import HyimgError

try:
    from fcntl import LOCK_EX, LOCK_NB, flock

    _HAS_FLOCK = True
except ImportError:  # Windows, where a file that is open cannot be removed
    _HAS_FLOCK = False

TEMPORARY_SUFFIX = ".hyimg-tmp"
"""The ending of temporary names."""

RENAMES_OPEN_FILES = _HAS_FLOCK
"""Whether an open file can be renamed; not on Windows."""

# Bytes of the destination's name in the temporary one; some file systems allow 143 in all
_STEM_BYTES, _STEM_START, _STEM_END = 100, 40, 48
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8,16}" + re.escape(TEMPORARY_SUFFIX), re.DOTALL)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
# On a file system without locks, a temporary file unchanged for this long is a leftover
_LEFTOVER_SECONDS = 3600.0


class LinkError(HyimgError):
    """A link is in place of a folder that hyimg writes in."""


# links -----------------------------------------------------------------------------------------------------


def is_link(path: Path | str) -> bool:
    """Whether the path is a symbolic link or a Windows junction, whatever its target."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return False
    return _is_link_stat(found)


def _is_link_stat(found: os.stat_result) -> bool:
    tag = getattr(found, "st_reparse_tag", 0)
    return stat.S_ISLNK(found.st_mode) or (tag != 0 and tag == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", 0))


def require_no_links(folder: Path | str, *, root: Path | str) -> None:
    """Raises `LinkError` if `folder`, or a folder between it and `root`, is a link.

    The root may be one. Missing folders are fine.
    """
    for path in _below(folder, root):
        if is_link(path):
            raise LinkError(
                f"`{path}` is a link, and links below `{root}` are not followed",
                hint="remove the link, or give the folder that it leads to by its own path",
            )


def _below(path: Path | str, root: Path | str) -> Iterator[str]:
    """The folders from `root` (exclusive) to `path`."""
    # strings are faster than paths, and each of 100,000 entries checks every folder on the way
    place, start = os.fspath(path), os.path.join(root, "")
    parts = (
        place[len(start) :].split(os.sep) if place.startswith(start) else Path(path).relative_to(root).parts
    )
    assert os.pardir not in parts, path
    place = os.fspath(root)
    for part in parts:
        if part:
            place = os.path.join(place, part)
            yield place


# folders ---------------------------------------------------------------------------------------------------


def make_folder(folder: Path | str, *, root: Path | str) -> None:
    """Creates `folder` and its missing parents. Raises `LinkError`, or `OSError` if it cannot be created."""
    if not os.path.isdir(root):
        Path(root).mkdir(parents=True, exist_ok=True)
    for path in _below(folder, root):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # created by another process meanwhile
                os.mkdir(path)
            found = os.lstat(path)
        if _is_link_stat(found):
            require_no_links(path, root=root)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def list_folder(folder: Path | str, *, root: Path | str) -> list[os.DirEntry[str]]:
    """The entries of `folder`, sorted by name, links unresolved; empty if it does not exist or is not a folder.

    Raises `LinkError`, and `OSError` if it cannot be read.
    """
    require_no_links(folder, root=root)
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk_files(folder: Path | str, *, root: Path | str) -> Iterator[Path]:
    """Everything below `folder` that is not a folder: files, and links, which are not followed."""
    for entry in list_folder(folder, root=root):
        if is_own_folder(entry):
            yield from walk_files(entry.path, root=root)
        else:
            yield Path(entry.path)


def is_own_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder and not a link to one."""
    return entry.is_dir(follow_symlinks=False) and not is_link(entry.path)


# renaming and removing -------------------------------------------------------------------------------------


def rename(path: Path, target: Path, *, root: Path | str) -> None:
    """Renames a file, folder or link, replacing a file; the target's folder is created. Both are below `root`.

    Raises `LinkError` if a folder on the way is a link, and `OSError`.
    """
    require_no_links(path.parent, root=root)
    make_folder(target.parent, root=root)
    os.replace(path, target)


def remove_file(path: Path | str, *, root: Path | str) -> None:
    """Removes a file or a link, if it exists. Raises `LinkError` for a link on the way, and `OSError`."""
    require_no_links(Path(path).parent, root=root)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_tree(folder: Path, *, root: Path | str) -> None:
    """Removes a folder with its contents, if it exists; a link or a file is itself removed.

    The folder is renamed to a temporary name first, so that a kill leaves nothing that looks like it. Raises
    `LinkError` for a link on the way, and `OSError` if it cannot be renamed.
    """
    require_no_links(folder.parent, root=root)
    if is_link(folder) or not folder.is_dir():
        remove_file(folder, root=root)
        return
    renamed = folder.with_name(temporary_name(folder.name))
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, renamed)
        shutil.rmtree(renamed, ignore_errors=True)


# files that grow -------------------------------------------------------------------------------------------


def open_to_append(path: Path, *, root: Path | str) -> BinaryIO:
    """Opens a file for appending and creates its folder; a link in its place is removed. Not for shared files.

    Raises `LinkError` for a link on the way, and `OSError`.
    """
    make_folder(path.parent, root=root)
    if is_link(path):
        os.unlink(path)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_FOLLOW | _BINARY
    return os.fdopen(os.open(path, flags, 0o666), "ab")


# temporary files -------------------------------------------------------------------------------------------


def temporary_name(name: str) -> str:
    """A new name in the same folder for a file that will become `name`, or a folder that will be removed."""
    return f".{temporary_stem(name)}.{os.getpid()}-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


def temporary_stem(name: str) -> str:
    """The part of temporary names that identifies `name`: the name, or start, hash and end of a long one."""
    data = os.fsencode(name)
    if len(data) <= _STEM_BYTES:
        return name
    start, end = (part.decode("utf-8", "ignore") for part in (data[:_STEM_START], data[-_STEM_END:]))
    return f"{start}~{hashlib.sha256(data).hexdigest()[:8]}~{end}"


def temporary_of(name: str) -> str | None:
    """The `temporary_stem` of a temporary name, or None for another name."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found is not None else None


def create_temporary(dst: Path) -> tuple[Path, int]:
    """A new empty file next to `dst` with a temporary name, and its locked descriptor; until that is closed, no run
    removes the file as a leftover. Raises `OSError`."""
    while True:
        path = dst.with_name(temporary_name(dst.name))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY
        descriptor = os.open(path, flags, 0o666)
        # another run may have removed the file as a leftover before it was locked
        if try_lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def remove_leftovers(folder: Path | str, is_ours: Callable[[str], bool], *, root: Path | str) -> None:
    """Removes the temporary files and folders that killed runs left in `folder` (not below it).

    `is_ours` says by the `temporary_stem` whether this command makes such a file. Files of other users, files that a
    running process writes, and files that cannot be removed are kept. Raises `LinkError` if the folder is a link.
    """
    with contextlib.suppress(OSError):
        for entry in list_folder(folder, root=root):
            stem = temporary_of(entry.name)
            if stem is not None and is_ours(stem):
                remove_leftover(entry)


def remove_leftover(entry: os.DirEntry[str]) -> None:
    """Removes a temporary file or folder, unless it belongs to another user or a running process writes it."""
    with contextlib.suppress(OSError):
        found = os.lstat(entry.path)
        if _is_link_stat(found) or (hasattr(os, "geteuid") and found.st_uid != os.geteuid()):
            return
        if stat.S_ISDIR(found.st_mode):
            # left by a process that was removing it
            shutil.rmtree(entry.path, ignore_errors=True)
        elif stat.S_ISREG(found.st_mode):
            _remove_unlocked(entry.path, found)


def _remove_unlocked(path: str, found: os.stat_result) -> None:
    if not _HAS_FLOCK:
        os.unlink(path)  # fails while it is open
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | _NO_FOLLOW)
    try:
        locked = try_lock(descriptor)
        if locked or (locked is None and time.time() - found.st_mtime > _LEFTOVER_SECONDS):
            os.unlink(path)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Whether this process got the file's lock; None if locks are not supported."""
    if not _HAS_FLOCK:
        return None
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True
