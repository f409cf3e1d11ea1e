"""A store of cache entries: content-addressed files, each with a checksum.

    <cache>/<kind>/<identity>/ab/abcdef....safetensors      <identity>/model.json names the model

The key of an entry is the hash of everything that makes it (its recipe, the model's identity, the format
version), so no entry can be stale. An entry can be damaged, which its checksum shows (`hyimg.cache.entry_file`).
`EntryStore` is what the latent and the text store share:

- a caching stage asks `check_entries(keys)` which entries are there and undamaged, and writes the others;
- training reads entries, and one that is missing or damaged is an error that names the command to run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hyimg.cache.atomic import atomic_path, atomic_write_text
from hyimg.cache.entry_file import StoredTensor, canonical_json, pack, to_tensor, unpack
from hyimg.cache.index import Index
from hyimg.cache.own_files import (
    is_link,
    is_own_folder,
    list_folder,
    remove_leftover,
    remove_leftovers,
    require_no_links,
    temporary_of,
)
from hyimg.config.documents import parse_json, read_bounded
from hyimg.errors import HyimgError, SystemLimitError

if TYPE_CHECKING:
    import torch

ENTRY_SUFFIX = ".safetensors"

EntryStat = tuple[int, int]
"""Size and mtime_ns of an entry's file; while they do not change, a checksum that matched is not checked again."""

_FOLDER = re.compile("[0-9a-f]{2}")
_FILE = re.compile("[0-9a-f]{64}" + re.escape(ENTRY_SUFFIX))

FORMAT_VERSION = 1
"""Raised whenever the same recipe gives other values; then every key changes."""

ENTRY_BYTES = 1_000_000_000
"""Size limit of an entry file: a latent of 2048x2048 pixels has 2 MB, a text of 1024 tokens in float32 15 MB."""

_IDENTITY_BYTES = 1_000_000
_IDENTITY_FILE = "model.json"
_IDENTITY_CHARS = 16
_DAMAGE = frozenset({errno.EISDIR, errno.EIO, errno.EFBIG, errno.EINVAL, errno.ENXIO})
_BACKDATE_NS = 3_000_000_000
_MOST_THREADS = 8
_READ_AHEAD = 1024


class MissingEntryError(HyimgError):
    """An entry that training needs is missing."""


class DamagedEntryError(HyimgError):
    """An entry's file is truncated, altered, or contains something else; `reason` says which."""

    def __init__(self, message: str, *, reason: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


@dataclass(frozen=True)
class EntryCheck:
    """The keys with an undamaged entry, and key -> what is wrong with a damaged one. A key in neither has no entry."""

    good: set[str]
    damaged: dict[str, str]


class EntryStore:
    """The entries of one kind made by one model, under `folder` (for example `hyimg-cache/latents`).

    `model_identity` is any text that changes whenever the model would give other values (a content hash, and whatever
    else matters: precision, template). `index` remembers which checksums matched, so that a warm check reads no entry;
    without it each check reads them all. `about` is written with the identity, for readers that cannot compute
    identities (`known_models`).

    The user named the cache folder, the parent of `folder`; below it no link is followed. A link in place of a folder
    raises `LinkError`; in place of an entry it counts as missing and is replaced.
    """

    kind: ClassVar[str]
    """The word for an entry in messages: "latent", "text"."""
    command: ClassVar[str]
    """The command that makes and repairs the entries."""
    models: ClassVar[str]
    """The options of that command for the model's files."""
    choice: ClassVar[str]
    """How to choose between the entries of several models in `train`."""
    train_flag: ClassVar[str]
    """The flag with which `train` makes the entries itself."""

    def __init__(
        self,
        folder: Path | str,
        model_identity: str,
        *,
        index: Index | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.model_identity = model_identity
        self.entries_folder = self.folder / _folder_name(model_identity)
        self._index = index
        self._about = dict(about or {})
        self._named = False

    @classmethod
    def identities(cls, folder: Path | str) -> list[str]:
        """The identities of the models that have entries under `folder`, in a fixed order."""
        return list(cls.known_models(folder))

    @classmethod
    def known_models(cls, folder: Path | str) -> dict[str, dict[str, str]]:
        """identity -> what was written about the model (`about`)."""
        found: dict[str, dict[str, str]] = {}
        folder = Path(folder)
        for entry in list_folder(folder, root=folder.parent):
            path = folder / entry.name / _IDENTITY_FILE
            if not is_own_folder(entry) or is_link(path):
                continue
            try:
                document = parse_json(read_bounded(path, _IDENTITY_BYTES), f"`{path}`")
                about = {k: str(v) for k, v in document.items()}
                found[about.pop("identity")] = about
            except SystemLimitError:
                raise
            except (HyimgError, OSError, KeyError):  # not a store, or one that does not say its model
                continue
        return found

    # keys and paths -------------------------------------------------------------------------------------

    def key_of(self, recipe: Mapping[str, object]) -> str:
        """The key (64 hexadecimal digits) of the entry that this model makes from `recipe` (plain JSON)."""
        made_from = {"format": FORMAT_VERSION, "kind": self.kind, "model": self.model_identity, **recipe}
        return hashlib.sha256(canonical_json(made_from).encode()).hexdigest()

    def path(self, key: str) -> Path:
        return self.entries_folder / key[:2] / f"{key}{ENTRY_SUFFIX}"

    # writing --------------------------------------------------------------------------------------------

    def write_tensors(
        self, key: str, tensors: Mapping[str, torch.Tensor], recipe: Mapping[str, object]
    ) -> None:
        """Writes an entry atomically; several processes may write the same one.

        Raises `HyimgError` if the folder cannot be written, `RunError` if the disk is full.
        """
        data = pack(key, tensors, recipe)
        if not self._named:
            self.name_the_model()
        path = self.path(key)
        if path.exists() and not path.is_file() and not is_link(path):
            _set_aside(path)
        # no flush (several ms per entry): the checksum shows what a power cut damages
        with atomic_path(path, root=self.root, durable=False, clean=False) as temporary:
            temporary.write_bytes(data)
            # backdated, so that damage right after writing changes the mtime whatever the clock's resolution
            written_ns = time.time_ns() - _BACKDATE_NS
            os.utime(temporary, ns=(written_ns, written_ns))
            stat = temporary.stat()
        if self._index is not None:
            self._index.remember_checked_entries(self._index_folder, [(key, stat.st_size, stat.st_mtime_ns)])

    def name_the_model(self) -> None:
        """Writes which model made the entries, if that is not written yet; raises as `atomic_path`."""
        path = self.entries_folder / _IDENTITY_FILE
        known = self.known_models(self.folder).get(self.model_identity, {})
        named = {"identity": self.model_identity, "kind": self.kind}
        text = canonical_json({**known, **named, **self._about}) + "\n"
        try:
            there = b"" if is_link(path) else read_bounded(path, _IDENTITY_BYTES)
        except OSError:
            there = b""
        if there != text.encode():
            atomic_write_text(path, text, root=self.root)
        self._named = True

    def remove(self, keys: Mapping[str, EntryStat]) -> dict[str, EntryStat]:
        """Removes entries whose files have not changed since they were listed; returns those removed."""
        removed: dict[str, EntryStat] = {}
        try:
            for key, stat in keys.items():
                path = self.path(key)
                require_no_links(path.parent, root=self.root)
                with contextlib.suppress(FileNotFoundError):
                    now = path.lstat()
                    if (now.st_size, now.st_mtime_ns) == stat:
                        path.unlink()
                        removed[key] = stat
        except OSError as error:
            raise HyimgError(
                f"cannot remove entries from the {self.kind} cache `{self.entries_folder}`: {error.strerror}",
                hint="prune as a user who may write there",
            ) from error
        finally:
            if self._index is not None and removed:
                self._index.forget_checked_entries(self._index_folder, removed)
        return removed

    # reading --------------------------------------------------------------------------------------------

    def read_verified(self, key: str) -> dict[str, StoredTensor]:
        """The tensors of an entry, its checksum verified.

        Raises `MissingEntryError` or `DamagedEntryError`, whose hint is the command that makes the entry.
        """
        path = self.path(key)
        try:
            if is_link(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            data = read_bounded(path, ENTRY_BYTES)
        except FileNotFoundError as error:
            raise MissingEntryError(
                f"no {self.kind} cache entry `{path.name}` in `{path.parent}`", hint=f"run `{self.command}`"
            ) from error
        except OSError as error:
            # a bad sector, or a folder or pipe in its place: writing the entry again replaces it
            if error.errno in _DAMAGE or path.is_dir():
                raise self._damaged(key, error.strerror or str(error)) from error
            raise HyimgError(f"cannot read the {self.kind} cache entry `{path}`: {error.strerror}") from error
        try:
            return unpack(key, data)
        except ValueError as error:
            raise self._damaged(key, str(error)) from error

    def read_tensors(
        self, key: str, required: Mapping[str, int], optional: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """The tensors of an entry on the CPU: name -> tensor with the given number of dimensions.

        Other tensors are skipped; the required ones must have equal shapes. Raises as `read_verified`.
        """
        stored = self.read_verified(key)
        expected = {**required, **optional}
        for name, num_dimensions in expected.items():
            if name not in stored:
                if name in required:
                    raise self._damaged(key, f"`{name}` is missing")
            elif len(stored[name][1]) != num_dimensions:
                raise self._damaged(key, f"`{name}` has {len(stored[name][1])} dimensions")
        if len({stored[name][1] for name in required}) > 1:
            raise self._damaged(key, f"{' and '.join(f'`{name}`' for name in required)} differ in shape")
        return {name: to_tensor(stored[name]) for name in expected if name in stored}

    def _damaged(self, key: str, reason: str) -> DamagedEntryError:
        # or a plain run of the command would take the index's word that the entry is undamaged
        if self._index is not None:
            self._index.forget_checked_entries(self._index_folder, [key])
        return DamagedEntryError(
            f"the {self.kind} cache entry `{self.path(key)}` is damaged: {reason}",
            reason=reason,
            hint=f"run `{self.command} --verify`, which only makes damaged and missing entries",
        )

    def _trouble(self, key: str) -> str | None:
        """What is wrong with an entry's file ("" if it is missing), or None; always reads it."""
        try:
            self.read_verified(key)
        except MissingEntryError:
            return ""
        except DamagedEntryError as error:
            return error.reason
        return None

    def good(
        self, keys: Iterable[str], *, verify: bool = False, progress: Callable[[int], None] | None = None
    ) -> set[str]:
        """The `keys` with an undamaged entry; see `check_entries`."""
        return self.check_entries(keys, verify=verify, progress=progress).good

    def check_entries(
        self, keys: Iterable[str], *, verify: bool = False, progress: Callable[[int], None] | None = None
    ) -> EntryCheck:
        """Which of `keys` have an undamaged entry, and which a damaged one.

        A file that has not changed since its checksum last matched is not read again, unless `verify`. `progress` is
        called with the number of keys checked since the last call.
        """
        there = self.listing()
        known = {} if self._index is None or verify else self._index.checked_entries(self._index_folder)
        good: set[str] = set()
        unread: list[str] = []
        num_keys = 0
        for key in keys:
            num_keys += 1
            if (stat := there.get(key)) is not None:
                if known.get(key) == stat:
                    good.add(key)
                else:
                    unread.append(key)
        if progress is not None:
            progress(num_keys - len(unread))
        damaged: dict[str, str] = {}
        for key, trouble in self._read_all(unread):
            if trouble is None:
                good.add(key)
            elif trouble:
                damaged[key] = trouble
            if progress is not None:
                progress(1)
        if self._index is not None:
            right = [(key, *there[key]) for key in unread if key in good]
            if right:
                self._index.remember_checked_entries(self._index_folder, right)
            if damaged:
                # damage may leave size and mtime as they were, and must be seen by the next run too
                self._index.forget_checked_entries(self._index_folder, damaged)
        return EntryCheck(good, damaged)

    def _read_all(self, keys: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """(key, `_trouble` of it) for each; hashing releases the interpreter lock, so threads help."""
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            for start in range(0, len(keys), _READ_AHEAD):
                chunk = keys[start : start + _READ_AHEAD]
                yield from zip(chunk, pool.map(self._trouble, chunk), strict=True)

    def listing(self) -> dict[str, EntryStat]:
        """key -> size and mtime of every entry's file. Temporary files left by killed runs are removed.

        A link in place of an entry's file is not listed. Raises `LinkError` for one in place of a folder.
        """
        remove_leftovers(self.entries_folder, {_IDENTITY_FILE}.__contains__, root=self.root)
        found: dict[str, EntryStat] = {}
        for file in self._files():
            with contextlib.suppress(OSError):  # another process may rename or remove it meanwhile
                if _FILE.fullmatch(file.name) is not None:
                    if not file.is_symlink():  # a folder is a damaged entry
                        stat = file.stat(follow_symlinks=False)
                        found[file.name[: -len(ENTRY_SUFFIX)]] = (stat.st_size, stat.st_mtime_ns)
                elif _FILE.fullmatch(temporary_of(file.name) or "") is not None:
                    remove_leftover(file)
        return found

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Everything in the folders `00` to `ff`."""
        for folder in list_folder(self.entries_folder, root=self.root):
            if _FOLDER.fullmatch(folder.name) is None:
                continue
            if not is_own_folder(folder):
                require_no_links(folder.path, root=self.root)
                continue
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder.path) as files:
                yield from list(files)

    @property
    def root(self) -> Path:
        """The cache folder."""
        return self.folder.parent

    @property
    def _index_folder(self) -> str:
        # relative, so that a cache folder can be moved
        return f"{self.folder.name}/{self.entries_folder.name}"


def _folder_name(identity: str) -> str:
    # an identity may be any text
    return hashlib.sha256(identity.encode()).hexdigest()[:_IDENTITY_CHARS]


def _set_aside(path: Path) -> None:
    """Renames a folder, pipe or device that has an entry's name: it may be somebody's, so it is not removed."""
    aside = path.with_name(f"{path.name}.set-aside-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        os.replace(path, aside)
