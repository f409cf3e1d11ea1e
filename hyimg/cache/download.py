"""Files of the Hugging Face hub: their metadata, and downloads that can be resumed by a later process.

huggingface_hub keeps no partial file between processes (2.x gives each download a temporary name, and removes it), so
30 of 35 GB would be downloaded again. Its `http_get` requests the rest of a file, follows the hub's redirects, retries
a busy server and checks the length; here it writes to a file that is kept.
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
from hyimg.cache.hashing import FileStat, Memo, file_identity
from hyimg.cache.own_files import open_to_append
from hyimg.errors import HyimgError, RunError

# Consecutive failures of `http_get` (which retries) without a new byte: half a minute with the pauses
_MAX_FRUITLESS = 3
_CHUNK_BYTES = 1 << 22
# Error numbers of a failed write other than a full disk; network errors have other numbers or none
_WRITE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


@dataclass(frozen=True)
class HubFile:
    """A file on the hub. `etag` is the content's sha256 (LFS), its git blob id, or something else."""

    repository: str
    path: str
    url: str
    size: int
    etag: str


def look_up(repository: str, path: str, *, revision: str, token: str | None) -> HubFile:
    """Asks the hub (`HF_ENDPOINT`, or huggingface.co) for a file's size and hash.

    Raises `HyimgError` for a repository, revision or file that does not exist or is not accessible with `token`, and
    `RunError` if the hub does not answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, path, revision=revision)
    try:
        found = get_hf_file_metadata(url, token=token)
    except Exception as error:
        raise _explain(error, repository, path, revision) from error
    if found.size is None:
        raise RunError(f"the hub does not give the size of `{path}` in `{repository}`")
    # the hub's URL, not `found.location`, which is signed and expires within an hour; by commit, as a branch may move
    url = hf_hub_url(repository, path, revision=found.commit_hash or revision)
    return HubFile(repository, path, url, found.size, found.etag or "")


def fetch(
    file: HubFile,
    partial: Path,
    *,
    root: Path,
    token: str | None,
    advance: Callable[[int], None],
    note: Callable[[str], None],
) -> None:
    """Downloads the bytes that `partial` does not have yet.

    `root` is the folder that the user gave, below which no link is followed. `advance` gets the number of bytes of each
    chunk (negative if a server starts over), `note` a line for each broken connection. Raises `RunError` if the disk is
    full or the download fails; `partial` then has what was downloaded, as after Ctrl-C.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (
        build_hf_headers,
        disable_progress_bars,
    )

    # our reporter shows progress and errors
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    fruitless = 0
    with open_to_append(partial, root=root) as raw:
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
                note(f"{explained.message}; resuming")
                time.sleep(min(2.0**fruitless, 15))
        raw.flush()
        os.fsync(raw.fileno())


def install(file: HubFile, partial: Path, dst: Path, memo: Memo, *, progress: Callable[[int], None]) -> bool:
    """Checks the hash of a complete `partial` and renames it to `dst`.

    `progress` gets the number of bytes read; `memo` remembers the hash. Returns whether the hub gave a hash to compare
    with. Raises `RunError` if the hash differs, and removes the file.
    """
    matches = _has_content(file, partial, None, progress)
    if matches is False:
        partial.unlink()
        raise RunError(
            f"checksum mismatch for `{file.path}` from `{file.repository}`",
            hint="run the same command again to download this file again",
        )
    os.replace(partial, dst)
    flush_folder(dst.parent)
    if matches and _is_sha256(file.etag):
        memo.remember_content_hash(os.path.abspath(dst), FileStat.of(os.stat(dst)), file.etag)
    return matches is not None


def is_complete(file: HubFile, path: Path, memo: Memo, *, progress: Callable[[int], None]) -> bool:
    """Whether `path` has the file's size and, if the hub gives one, its hash; `memo` saves reading it."""
    return path.stat().st_size == file.size and _has_content(file, path, memo, progress) is not False


def _has_content(
    file: HubFile, path: Path, memo: Memo | None, progress: Callable[[int], None]
) -> bool | None:
    """Whether the content has the hub's hash; None if the hub gives none."""
    if _is_sha256(file.etag):
        return file_identity(path, memo, progress=progress) == file.etag
    if re.fullmatch("[0-9a-f]{40}", file.etag):
        return _git_blob_id(path, progress) == file.etag
    return None


def _is_sha256(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", etag) is not None


def _git_blob_id(path: Path, progress: Callable[[int], None]) -> str:
    """Git's hash of a file's content, which the hub gives for small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


class _Counted:
    """The file that `http_get` writes to, reporting how much it grows."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        # if the process is killed, the file has what was counted
        self._file.flush()
        self._advance(written)
        return written

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        """Called if a server cannot send the rest and starts over."""
        before = os.fstat(self._file.fileno()).st_size
        size = self._file.truncate(size)
        self._advance(size - before)
        return size


class _BrokenConnectionError(RunError):
    """A network error that a retry may not have."""


def _explain(error: Exception, repository: str, path: str, revision: str | None) -> HyimgError:
    """Our error for one of the hub library's."""
    from huggingface_hub import errors

    at = f" at `{revision}`" if revision not in (None, "main") else ""
    again = "run the same command again to resume"
    if isinstance(error, (AttributeError, NameError, TypeError)):
        raise error  # a bug here, or another release of the library
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"the disk is full: `{path}` could not be downloaded completely",
            hint=f"free some space, and {again}",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HyimgError("cannot download: `HF_HUB_OFFLINE` is set", hint="unset it")
    if isinstance(error, errors.GatedRepoError):
        return HyimgError(
            f"`{repository}` is a gated repository",
            hint="request access on its page, and give your `--token` or set `HF_TOKEN`",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HyimgError(
            f"there is no repository `{repository}` at {_endpoint()}, or you have no access",
            hint="a private mirror needs `--token` or `HF_TOKEN`; `HF_ENDPOINT` selects the hub",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HyimgError(
            f"`{repository}` has no revision `{revision}`", hint="correct `--revision`, or remove it"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HyimgError(
            f"`{repository}`{at} at {_endpoint()} has no file `{path}`",
            hint="look for it on the repository's page, and download it by hand",
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
