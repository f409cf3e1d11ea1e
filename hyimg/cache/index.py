"""The index of a cache folder: what was read once, so that a warm start need not read it again.

An SQLite file that maps

- (path, size, mtime, inode) of any file to the hash of its content,
- an image's content hash to its width and height when upright (after EXIF orientation),
- an image's or mask's content hash to the parts that are ignored or converted (`hyimg.data.findings`),
- a cache entry's (size, mtime) to the fact that its checksum matched.

A lost or damaged index is rebuilt and costs only time. SQLite has no checksums, so rows that could cause a wrong result
(a hash or an image's size with a flipped bit, which no entry's checksum would show) have one, and count as missing if
it does not match. Several processes may write the index (WAL). In a folder that cannot be written it is only read, and
new facts are kept in memory. A link in its place is replaced; another program's database is an error and is not
changed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyimg.cache.hashing import FileStat
from hyimg.cache.own_files import is_link
from hyimg.errors import HyimgError

INDEX_NAME = "index.sqlite"

# "hymi", in the header of every index
_APPLICATION_ID = 0x68796D69
_SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT, crc INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    sha256 TEXT PRIMARY KEY, width INTEGER, height INTEGER, crc INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS traits (key TEXT PRIMARY KEY, names TEXT, crc INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    folder TEXT, name TEXT, size INTEGER, mtime_ns INTEGER, PRIMARY KEY (folder, name)) WITHOUT ROWID;
"""
# Indexes from before the ID: their tables, and the first columns of those in all versions
_OLDER_TABLES = {"files", "images", "entries", "masks", "traits"}
_OLDER_COLUMNS = {
    "files": ["path", "size", "mtime_ns", "inode", "sha256"],
    "images": ["sha256", "width", "height"],
    "entries": ["folder", "name", "size", "mtime_ns"],
}
_SIDE_FILES = ("", "-wal", "-shm", "-journal")
# another process may hold the write lock while the system flushes
_BUSY_SECONDS = 20.0
# a flipped bit in a text may make it invalid UTF-8
_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
# SQLite before 3.32 allows no more values in one query
_MOST_VALUES = 999

Image = tuple[FileStat, str, tuple[int, int]]
"""Of an image file when it was read: its stat, content hash, and (width, height)."""


class Index:
    """The index of one cache folder; `Index(None)` keeps everything in memory.

    Thread-safe, picklable, and safe across a fork: each process opens its own connection on first use, which raises
    `HyimgError` if the file is another program's database.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.was_damaged = False
        """Whether the file was damaged and has been discarded."""
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.was_damaged = state["folder"], False
        self._start()

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    # files ----------------------------------------------------------------------------------------------

    def content_hash(self, path: str, stat: FileStat) -> str | None:
        """The sha256 of the file's content if it is unchanged since it was hashed."""
        rows = self._rows("SELECT size, mtime_ns, inode, sha256, crc FROM files WHERE path = ?", path)
        for *known, sha256, crc in rows:
            if FileStat(*known) == stat and crc == _crc(path, *known, sha256):
                return str(sha256)
        return None

    def remember_content_hash(self, path: str, stat: FileStat, sha256: str) -> None:
        row = (path, stat.size, stat.mtime_ns, stat.inode, sha256)
        self._write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (*row, _crc(*row)))

    # images ---------------------------------------------------------------------------------------------

    def images(self, paths: Sequence[str]) -> dict[str, Image]:
        """path -> what is known about the image; the caller compares the `FileStat`."""
        found: dict[str, Image] = {}
        for start in range(0, len(paths), _MOST_VALUES):
            chunk = paths[start : start + _MOST_VALUES]
            rows = self._rows(
                "SELECT path, size, mtime_ns, inode, sha256, files.crc, width, height, images.crc "
                f"FROM files JOIN images USING (sha256) WHERE path IN ({','.join('?' * len(chunk))})",
                *chunk,
            )
            for path, size, mtime_ns, inode, sha256, file_crc, width, height, image_crc in rows:
                if file_crc == _crc(path, size, mtime_ns, inode, sha256) and image_crc == _crc(
                    sha256, width, height
                ):
                    found[path] = (FileStat(size, mtime_ns, inode), sha256, (width, height))
        return found

    def image_size(self, sha256: str) -> tuple[int, int] | None:
        """(width, height) of the image with this content, if it was read before."""
        for width, height, crc in self._rows(
            "SELECT width, height, crc FROM images WHERE sha256 = ?", sha256
        ):
            if crc == _crc(sha256, width, height):
                return (width, height)
        return None

    def remember_image_size(self, sha256: str, size: tuple[int, int]) -> None:
        self._write("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", (sha256, *size, _crc(sha256, *size)))

    def traits(self, keys: Sequence[str]) -> dict[str, frozenset[str]]:
        """key -> the traits found when that image or mask was read; unknown keys are omitted."""
        found: dict[str, frozenset[str]] = {}
        for start in range(0, len(keys), _MOST_VALUES):
            chunk = keys[start : start + _MOST_VALUES]
            query = f"SELECT key, names, crc FROM traits WHERE key IN ({','.join('?' * len(chunk))})"
            for key, names, crc in self._rows(query, *chunk):
                if crc == _crc(key, names):
                    found[key] = frozenset(names.split())
        return found

    def remember_traits(self, traits: Mapping[str, Collection[str]]) -> None:
        """Remembers the traits (words without spaces) of each key."""
        rows = [(key, " ".join(sorted(names))) for key, names in traits.items()]
        self._write("INSERT OR REPLACE INTO traits VALUES (?, ?, ?)", *((*row, _crc(*row)) for row in rows))

    # entries --------------------------------------------------------------------------------------------

    def checked_entries(self, folder: str) -> dict[str, tuple[int, int]]:
        """Entry name -> (size, mtime_ns) when its checksum last matched, for a store's folder."""
        rows = self._rows("SELECT name, size, mtime_ns FROM entries WHERE folder = ?", folder)
        return {name: (size, mtime_ns) for name, size, mtime_ns in rows}

    def remember_checked_entries(self, folder: str, entries: Iterable[tuple[str, int, int]]) -> None:
        """Remembers (name, size, mtime_ns) of entries whose checksum matches."""
        self._write(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", *((folder, *entry) for entry in entries)
        )

    def forget_checked_entries(self, folder: str, names: Iterable[str]) -> None:
        """Forgets that the checksums of these entries matched."""
        self._write("DELETE FROM entries WHERE folder = ? AND name = ?", *((folder, name) for name in names))

    # the connection -------------------------------------------------------------------------------------

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._open().execute(query, values).fetchall()
            except _DAMAGE as error:
                # other operational errors (a long lock, a failing disk) are not damage; knowing nothing is safe
                if not isinstance(error, sqlite3.OperationalError) or "decode" in str(error):
                    self._recover()
                return []

    def _write(self, statement: str, *rows: tuple[object, ...]) -> None:
        # forgetting is safe, so failed writes (disk full, a long lock) are not errors
        with self._lock, contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            connection = self._open()
            with connection:
                connection.executemany(statement, rows)

    def _open(self) -> sqlite3.Connection:
        # a connection must not be used in a forked child; it is not closed, which would release the parent's locks
        if self._connection is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        if self.folder is None:
            return _prepared(sqlite3.connect(":memory:", check_same_thread=False))
        path = self.folder / INDEX_NAME
        if not _is_plain(path):
            return _prepared(sqlite3.connect(":memory:", check_same_thread=False))
        _require_own_header(path)
        try:
            return self._connect_file(path)
        except (sqlite3.OperationalError, OSError):
            return _read_only_copy(path)
        except _DAMAGE:
            self.was_damaged = True
            self._remove(path)
            try:
                return self._connect_file(path)
            except (*_DAMAGE, OSError):
                return _prepared(sqlite3.connect(":memory:", check_same_thread=False))

    def _connect_file(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            # if another process uses the index, its header may still be in the WAL
            if not _is_ours(connection):
                raise _other_program(path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            return _prepared(connection)
        except BaseException:
            connection.close()
            raise

    def _recover(self) -> None:
        """After damage found while reading: discards the file, so that everything is read again."""
        self.close()
        self.was_damaged = True
        if self.folder is not None:
            self._remove(self.folder / INDEX_NAME)
            if (self.folder / INDEX_NAME).exists():  # it cannot be removed, so it is no longer used
                self.folder = None

    def _remove(self, path: Path) -> None:
        for suffix in _SIDE_FILES:
            with contextlib.suppress(OSError):
                path.with_name(path.name + suffix).unlink()


def _crc(*values: object) -> int:
    return zlib.crc32(repr(values).encode("utf-8", "surrogatepass"))


def _is_plain(path: Path) -> bool:
    """Whether none of the index's files is a link (which SQLite would follow) or a pipe (on which it would block).

    Links are removed first, if possible.
    """
    files = [path.with_name(path.name + suffix) for suffix in _SIDE_FILES]
    for file in files:
        if is_link(file):
            with contextlib.suppress(OSError):
                file.unlink()
    return not any(
        is_link(file) or (file.exists() and not file.is_file() and not file.is_dir()) for file in files
    )


def _require_own_header(path: Path) -> None:
    """Raises HyimgError if the file is another program's database, which merely opening could change.

    A damaged file passes.
    """
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except OSError:
        return
    # https://sqlite.org/fileformat2.html#database_header
    if not header.startswith(b"SQLite format 3\0") or header[68:72] == _APPLICATION_ID.to_bytes(4, "big"):
        return
    try:
        with contextlib.closing(_opened_unchanged(path)) as connection:
            ours = _is_ours(connection)
    except _DAMAGE:
        ours = header[68:72] == bytes(4)
    if not ours:
        raise _other_program(path)


def _is_ours(connection: sqlite3.Connection) -> bool:
    """Whether a database is an index, by its ID or the tables of older ones, or is empty."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id == _APPLICATION_ID:
        return True
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type <> 'index'")}
    if not tables:
        return bool(application_id == 0)
    return _OLDER_COLUMNS.keys() <= tables <= _OLDER_TABLES and all(
        [row[1] for row in connection.execute(f"PRAGMA table_info({table})")][: len(columns)] == columns
        for table, columns in _OLDER_COLUMNS.items()
    )


def _other_program(path: Path) -> HyimgError:
    return HyimgError(
        f"`{path}` is another program's database, not an index of hyimg",
        hint="move it, or give another `--cache_dir`",
    )


def _opened_unchanged(path: Path) -> sqlite3.Connection:
    """A database opened read-only without lock files, as needed in a folder that cannot be written."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The connection with its tables created; an index of another format version is emptied."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != _SCHEMA_VERSION:
        with connection:
            for table in ("files", "images", "traits", "entries"):
                connection.execute(f"DROP TABLE IF EXISTS {table}")
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    if connection.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.executescript(_SCHEMA)
    return connection


def _read_only_copy(path: Path) -> sqlite3.Connection:
    """An index that cannot be opened for writing, copied to memory; empty if unreadable."""
    try:
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        with contextlib.closing(_opened_unchanged(path)) as source:
            source.backup(memory)
        return _prepared(memory)
    except _DAMAGE:
        return _prepared(sqlite3.connect(":memory:", check_same_thread=False))
