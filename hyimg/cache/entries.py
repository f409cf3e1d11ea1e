"""A store of cache entries: content-addressed files that are right, or count as missing.

    <cache>/<kind>/<identity>/ab/abcdef....safetensors      <identity>/model.json says which model

The key of an entry is the hash of everything that makes it (its recipe, the model's identity, the format
version), so nothing in the store can be stale; what can happen is damage, and each entry carries a
checksum (`hyimg.cache.entry_file`). `EntryStore` is what the latent and the text store share:

- a stage asks `survey(keys)` which entries need not be made and which were damaged, and writes the others;
- the training reader reads, and a missing or damaged entry is an error that names the command to run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hyimg.cache.atomic import atomic_path, atomic_write_text
from hyimg.cache.entry_file import RawTensor, canonical_json, pack, unpack
from hyimg.cache.index import Index
from hyimg.cache.listing import ENTRY_SUFFIX, EntryStat, list_entries
from hyimg.errors import HyimgError

FORMAT_VERSION = 1
"""Raised whenever an entry would hold other numbers for the same recipe; then every key changes."""

_IDENTITY_FILE = "model.json"
_IDENTITY_CHARS = 16
_BACKDATE_NS = 3_000_000_000
_MOST_THREADS = 8
_READ_AHEAD = 1024


class MissingEntryError(HyimgError):
    """An entry that must be there for training is not."""


class DamagedEntryError(HyimgError):
    """An entry's file is cut short, altered, or holds something else; `reason` says which."""

    def __init__(self, message: str, *, reason: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


@dataclass(frozen=True)
class Survey:
    """Of the keys that were asked for: those whose entries are right, and what is wrong with the damaged ones.

    A key in neither has no entry.
    """

    good: set[str]
    damaged: dict[str, str]


class EntryStore:
    """The entries of one kind made by one model, under `folder` (say `hyimg-cache/latents`).

    `model_identity` is any text that changes whenever the model would give other numbers (a content
    hash, and whatever else matters: precision, template). `index` remembers which checksums were seen
    right, so that a warm `good` reads no entry; without it each call reads them all.
    """

    kind: ClassVar[str]
    """The word for an entry in messages: "latent", "text"."""
    command: ClassVar[str]
    """The command that makes and repairs the entries."""
    models: ClassVar[str]
    """The options of this command that name the model's files."""

    def __init__(self, folder: Path | str, model_identity: str, *, index: Index | None = None) -> None:
        self.folder = Path(folder)
        self.model_identity = model_identity
        self.entries_folder = self.folder / _folder_name(model_identity)
        self._index = index
        self._named = False

    @classmethod
    def identities(cls, folder: Path | str) -> list[str]:
        """The identities of the models that have entries under `folder`, in a fixed order."""
        found: list[str] = []
        for path in sorted(Path(folder).glob(f"*/{_IDENTITY_FILE}")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.append(str(json.loads(path.read_text(encoding="utf-8"))["identity"]))
        return found

    # keys and places ------------------------------------------------------------------------------------

    def key_of(self, recipe: Mapping[str, object]) -> str:
        """The key (64 hexadecimal digits) of the entry that this model makes from `recipe` (plain JSON)."""
        made_from = {"format": FORMAT_VERSION, "kind": self.kind, "model": self.model_identity, **recipe}
        return hashlib.sha256(canonical_json(made_from).encode()).hexdigest()

    def path(self, key: str) -> Path:
        return self.entries_folder / key[:2] / f"{key}{ENTRY_SUFFIX}"

    def has(self, key: str) -> bool:
        """Whether an entry's file is there, unread (`good` says whether it is right)."""
        return self.path(key).is_file()

    # writing --------------------------------------------------------------------------------------------

    def write_raw(self, key: str, tensors: Mapping[str, RawTensor], recipe: Mapping[str, object]) -> None:
        """Writes an entry whole; several processes may write the same one.

        Raises `HyimgError` where the folder cannot be written, `RunError` where the disk is full.
        """
        data = pack(key, tensors, recipe)
        if not self._named:
            self.name_the_model()
        path = self.path(key)
        if path.is_dir():
            _set_aside(path)
        # the checksum sees what a power cut does, so the flush (several ms an entry) is left out
        with atomic_path(path, durable=False) as temporary:
            temporary.write_bytes(data)
            # dated back, so that damage right after writing cannot hide within one tick of the file clock
            written_ns = time.time_ns() - _BACKDATE_NS
            os.utime(temporary, ns=(written_ns, written_ns))
            stat = temporary.stat()
        if self._index is not None:
            self._index.remember_checked_entries(self._index_folder, [(key, stat.st_size, stat.st_mtime_ns)])

    def name_the_model(self) -> None:
        """Writes which model the entries are of, unless it stands there; raises as `atomic_path`."""
        path = self.entries_folder / _IDENTITY_FILE
        text = canonical_json({"identity": self.model_identity, "kind": self.kind}) + "\n"
        try:
            there = path.read_bytes()
        except OSError:
            there = b""
        if there != text.encode():
            atomic_write_text(path, text)
        self._named = True

    def remove(self, keys: Mapping[str, EntryStat]) -> dict[str, EntryStat]:
        """Removes entries whose files are still the ones listed; those that were removed."""
        removed: dict[str, EntryStat] = {}
        try:
            for key, stat in keys.items():
                path = self.path(key)
                with contextlib.suppress(FileNotFoundError):
                    now = path.stat()
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

    def read_raw(self, key: str) -> dict[str, RawTensor]:
        """The tensors of an entry, its checksum verified.

        Raises `MissingEntryError` or `DamagedEntryError`, whose hint is the command that makes the entry.
        """
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise MissingEntryError(
                f"no {self.kind} cache entry `{path.name}` in `{path.parent}`", hint=f"run `{self.command}`"
            ) from error
        except OSError as error:
            # a folder in its place, a bad sector: another file in its place mends either
            if error.errno in (errno.EISDIR, errno.EIO) or path.is_dir():
                raise self._damaged(key, error.strerror or str(error)) from error
            raise HyimgError(f"cannot read the {self.kind} cache entry `{path}`: {error.strerror}") from error
        try:
            return unpack(key, data)
        except ValueError as error:
            raise self._damaged(key, str(error)) from error

    def _damaged(self, key: str, reason: str) -> DamagedEntryError:
        """The error, once the index no longer says that the entry is right, so that the hint's command acts."""
        if self._index is not None:
            self._index.forget_checked_entries(self._index_folder, [key])
        return DamagedEntryError(
            f"the {self.kind} cache entry `{self.path(key)}` is damaged: {reason}",
            reason=reason,
            hint=f"run `{self.command} --verify`, which makes exactly the damaged and missing entries again",
        )

    def is_good(self, key: str) -> bool:
        """Whether an entry is there and its checksum is right; always reads the file."""
        return self._trouble(key) is None

    def _trouble(self, key: str) -> str | None:
        """What is wrong with an entry's file ("" where there is none), or None; always reads it."""
        try:
            self.read_raw(key)
        except MissingEntryError:
            return ""
        except DamagedEntryError as error:
            return error.reason
        return None

    def good(
        self, keys: Iterable[str], *, verify: bool = False, progress: Callable[[int], None] | None = None
    ) -> set[str]:
        """Those of `keys` whose entries are there and undamaged; see `survey`."""
        return self.survey(keys, verify=verify, progress=progress).good

    def survey(
        self, keys: Iterable[str], *, verify: bool = False, progress: Callable[[int], None] | None = None
    ) -> Survey:
        """Which of `keys` have a good entry, and which a damaged one, which counts as missing.

        A file that is untouched since its checksum was last seen right is not read again, unless
        `verify`. `progress` is called with the number of keys settled since its last call.
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
                # damage that keeps size and time must not count as right in the next run either
                self._index.forget_checked_entries(self._index_folder, damaged)
        return Survey(good, damaged)

    def _read_all(self, keys: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """(key, what is wrong with it) of each; hashing releases the interpreter lock, so threads help."""
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            for start in range(0, len(keys), _READ_AHEAD):
                chunk = keys[start : start + _READ_AHEAD]
                yield from zip(chunk, pool.map(self._trouble, chunk), strict=True)

    def listing(self) -> dict[str, EntryStat]:
        """key -> size and mtime of every entry's file. Temporary files left by killed runs are removed."""
        return list_entries(self.entries_folder)

    @property
    def _index_folder(self) -> str:
        # relative, so that a cache folder that is moved as a whole keeps its index
        return f"{self.folder.name}/{self.entries_folder.name}"


def _folder_name(identity: str) -> str:
    """A folder name for an identity: hashed, since an identity may be any text."""
    return hashlib.sha256(identity.encode()).hexdigest()[:_IDENTITY_CHARS]


def _set_aside(folder: Path) -> None:
    """Renames a folder that stands where an entry belongs: what is in it is somebody's, and is kept."""
    aside = folder.with_name(f"{folder.name}.set-aside-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        os.replace(folder, aside)
