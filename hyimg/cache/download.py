"""Files of the Hugging Face hub: what the hub says of one, and one fetched so that it goes on after any stop.

huggingface_hub keeps no part of a file from one process to the next (2.x gives each download a temporary name of its
own, and removes it): 30 of 35 GB would come again. Its `http_get` asks for the rest of a file, follows the hub's
redirects, waits out a busy server and checks the length; here it writes to a file that stays.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hyimg.cache.atomic import flush_folder
from hyimg.cache.identity import FileStat, Memo, file_identity
from hyimg.errors import HyimgError, RunError

# How often in a row all tries of `http_get` may bring not one more byte: half a minute, with the pauses
_MAX_FRUITLESS = 3
_CHUNK_BYTES = 1 << 22
# What a disk answers to a write, beside that it is full; a network's errors have other numbers or none
_WRITE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


@dataclass(frozen=True)
class HubFile:
    """A file as the hub has it. `etag` is the content's sha256 (LFS), its git blob id, or of no known meaning."""

    repository: str
    path: str
    url: str
    size: int
    etag: str


def look_up(repository: str, path: str, *, revision: str, token: str | None) -> HubFile:
    """Asks the hub (`HF_ENDPOINT`, or huggingface.co) for a file's size and hash.

    Raises `HyimgError` for a repository, revision or file that is not there or not open to `token`, and
    `RunError` where the hub does not answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, path, revision=revision)
    try:
        found = get_hf_file_metadata(url, token=token)
    except Exception as error:
        raise _explain(error, repository, path, revision) from error
    if found.size is None:
        raise RunError(f"the hub does not tell the size of `{path}` in `{repository}`")
    # the hub's own address, not `found.location`: that one is signed, and runs out within the hour. By commit, so
    # that a branch may move meanwhile
    url = hf_hub_url(repository, path, revision=found.commit_hash or revision)
    return HubFile(repository, path, url, found.size, found.etag or "")


def fetch(
    file: HubFile,
    partial: Path,
    *,
    token: str | None,
    advance: Callable[[int], None],
    note: Callable[[str], None],
) -> None:
    """Brings the bytes that `partial` lacks; what it holds of this very file already is kept.

    `advance` gets the number of each few bytes that came (negative where a server sends all of it again), `note`
    a line on each connection that broke. Raises `RunError` where the disk is full or the hub gives up; `partial`
    then holds what has come, as it does after Ctrl-C.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (
        build_hf_headers,
        disable_progress_bars,
    )

    # the reporter's progress and sentences take the place of its own
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    partial.parent.mkdir(parents=True, exist_ok=True)
    fruitless = 0
    with partial.open("ab") as raw:
        if raw.tell() > file.size:
            raw.seek(0)
            raw.truncate()
        out = _Counted(raw, advance)
        while raw.tell() != file.size:
            before = raw.tell()
            try:
                http_get(
                    file.url,
                    cast(BinaryIO, out),
                    resume_size=before,
                    headers=build_hf_headers(token=token),
                    expected_size=file.size,
                )
            except Exception as error:
                explained = _explain(error, file.repository, file.path, None)
                fruitless = fruitless + 1 if raw.tell() <= before else 0
                if not isinstance(explained, _BrokenConnectionError) or fruitless > _MAX_FRUITLESS:
                    raise explained from error
                note(f"{explained.message}; going on")
                time.sleep(min(2.0**fruitless, 15))
        raw.flush()
        os.fsync(raw.fileno())


def install(file: HubFile, partial: Path, dst: Path, memo: Memo, *, progress: Callable[[int], None]) -> bool:
    """Puts a complete `partial` in the place of `dst`, after a look at its content.

    `progress` gets the number of bytes that were read; `memo` remembers the hash. Returns whether the hub gave a
    hash to compare with. Raises `RunError` where the content is another, and removes it.
    """
    matches = _has_content(file, partial, None, progress)
    if matches is False:
        partial.unlink()
        raise RunError(
            f"what came as `{file.path}` is not the file that `{file.repository}` tells of: its hash is another",
            hint="run the same command again: this file is fetched anew",
        )
    os.replace(partial, dst)
    flush_folder(dst.parent)
    if matches and _is_sha256(file.etag):
        memo.remember_content_hash(os.path.abspath(dst), FileStat.of(os.stat(dst)), file.etag)
    return matches is not None


def is_complete(file: HubFile, path: Path, memo: Memo, *, progress: Callable[[int], None]) -> bool:
    """Whether `path` holds the file: its size and, where the hub gives one, its hash; `memo` spares the reading."""
    return path.stat().st_size == file.size and _has_content(file, path, memo, progress) is not False


def _has_content(
    file: HubFile, path: Path, memo: Memo | None, progress: Callable[[int], None]
) -> bool | None:
    """Whether the content has the hash that the hub gives; None where it gives none."""
    if _is_sha256(file.etag):
        return file_identity(path, memo, progress=progress) == file.etag
    if re.fullmatch("[0-9a-f]{40}", file.etag):
        return _git_blob_id(path, progress) == file.etag
    return None


def _is_sha256(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", etag) is not None


def _git_blob_id(path: Path, progress: Callable[[int], None]) -> str:
    """Git's name of a file's content, which the hub gives for small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


class _Counted:
    """The file that `http_get` writes to, telling how much it grows."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        # whoever stops the process by force finds what was counted
        self._file.flush()
        self._advance(written)
        return written

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        """A server that cannot send the rest sends the whole: what was there is dropped."""
        before = os.fstat(self._file.fileno()).st_size
        size = self._file.truncate(size)
        self._advance(size - before)
        return size


class _BrokenConnectionError(RunError):
    """Trouble on the way, which another try may not meet."""


def _explain(error: Exception, repository: str, path: str, revision: str | None) -> HyimgError:
    """The sentence for what the hub's library raised."""
    from huggingface_hub import errors

    at = f" at `{revision}`" if revision not in (None, "main") else ""
    again = "run the same command again: it goes on where it stopped"
    if isinstance(error, (AttributeError, NameError, TypeError)):
        raise error  # a mistake of ours, or another release of the library
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"the disk is full: `{path}` could not be fetched whole", hint=f"free some space, and {again}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HyimgError("nothing can be fetched: `HF_HUB_OFFLINE` is set", hint="unset it")
    if isinstance(error, errors.GatedRepoError):
        return HyimgError(
            f"`{repository}` opens its files only to those who asked for them",
            hint="ask on its page, and give your `--token` or set `HF_TOKEN`",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HyimgError(
            f"there is no repository `{repository}` at {_endpoint()}, or it is not open to you",
            hint="a private mirror needs `--token` or `HF_TOKEN`; `HF_ENDPOINT` says which hub is asked",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HyimgError(
            f"`{repository}` has no revision `{revision}`", hint="mend `--revision`, or leave it out"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HyimgError(
            f"`{repository}`{at} at {_endpoint()} has no file `{path}`",
            hint="look at the repository's page for what has become of it, and download it by hand",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return RunError(f"{_endpoint()} refuses `{path}` of `{repository}` (HTTP {status})", hint=again)
    if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
        return RunError(f"`{path}` cannot be written: {error.strerror}", hint="choose another folder")
    return _BrokenConnectionError(
        f"the connection to {_endpoint()} broke: {reason}", hint=f"check the network, and {again}"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
