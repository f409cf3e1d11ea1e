"""The index of a cache folder: what was once read, so that a warm start need not read it again.

An SQLite file that remembers

- of any file, by (path, size, mtime, inode): the hash of its content,
- of an image's content hash: its width and height as seen (after EXIF orientation),
- of a cache entry, by (size, mtime): that its checksum was right.

Nothing in it is a source of truth: a lost or damaged index costs time only, and is made anew. SQLite keeps
no checksums of its own, so what a wrong result could come from carries one: a row with a flipped bit is a
row that is not there. Several processes may write it (WAL). In a folder that cannot be written it is used
as it stands, and what is learnt is kept in memory.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hyimg.cache.identity import FileStat

INDEX_NAME = "index.sqlite"

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT, crc INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    sha256 TEXT PRIMARY KEY, width INTEGER, height INTEGER, crc INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    folder TEXT, name TEXT, size INTEGER, mtime_ns INTEGER, PRIMARY KEY (folder, name)) WITHOUT ROWID;
"""
# another process may hold the write lock for as long as the system takes to flush
_BUSY_SECONDS = 20.0
# flipped bits in SQLite's own texts come out as texts that are none
_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
# SQLite before 3.32 takes no more values in one query
_MOST_VALUES = 999

Image = tuple[FileStat, str, tuple[int, int]]
"""An image file as it was read: what it was then, its content hash, its (width, height)."""


class Index:
    """The index of one cache folder; `Index(None)` keeps everything in memory.

    Usable from several threads, picklable, and safe to carry over a fork: each process opens its own
    connection on first use.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.was_damaged = False
        """Whether what stood in the file was found damaged, and dropped."""
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
        """The sha256 of the file's content if it is the very file that was hashed before."""
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
        """What is known of those of `paths` that were read before; whoever asks compares the `FileStat`."""
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
        """(width, height) of the image with this content, known to be readable."""
        for width, height, crc in self._rows(
            "SELECT width, height, crc FROM images WHERE sha256 = ?", sha256
        ):
            if crc == _crc(sha256, width, height):
                return (width, height)
        return None

    def remember_image_size(self, sha256: str, size: tuple[int, int]) -> None:
        self._write("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", (sha256, *size, _crc(sha256, *size)))

    # entries --------------------------------------------------------------------------------------------

    def checked_entries(self, folder: str) -> dict[str, tuple[int, int]]:
        """Of a store's folder: entry name -> (size, mtime_ns) at which its checksum was last seen right."""
        rows = self._rows("SELECT name, size, mtime_ns FROM entries WHERE folder = ?", folder)
        return {name: (size, mtime_ns) for name, size, mtime_ns in rows}

    def remember_checked_entries(self, folder: str, entries: Iterable[tuple[str, int, int]]) -> None:
        """Remembers (name, size, mtime_ns) of entries whose checksum is right."""
        self._write(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", *((folder, *entry) for entry in entries)
        )

    def forget_checked_entries(self, folder: str, names: Iterable[str]) -> None:
        """Forgets that the checksums of these entries were right."""
        self._write("DELETE FROM entries WHERE folder = ? AND name = ?", *((folder, name) for name in names))

    # the connection -------------------------------------------------------------------------------------

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._open().execute(query, values).fetchall()
            except _DAMAGE as error:
                # but locked for long, or a disk in trouble, is no damage; to know nothing is always right
                if not isinstance(error, sqlite3.OperationalError) or "decode" in str(error):
                    self._recover()
                return []

    def _write(self, statement: str, *rows: tuple[object, ...]) -> None:
        # to forget is always right, so trouble with writing (disk full, a lock held for a minute) is no error
        with self._lock, contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            connection = self._open()
            with connection:
                connection.executemany(statement, rows)

    def _open(self) -> sqlite3.Connection:
        # a connection must not be used in a forked child; it is dropped unclosed, so that the parent's
        # locks stay as they are
        if self._connection is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        if self.folder is None:
            return _prepared(sqlite3.connect(":memory:", check_same_thread=False))
        path = self.folder / INDEX_NAME
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
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            return _prepared(connection)
        except BaseException:
            connection.close()
            raise

    def _recover(self) -> None:
        """After damage that shows on reading: the file is dropped, and everything is learnt again."""
        self.close()
        self.was_damaged = True
        if self.folder is not None:
            self._remove(self.folder / INDEX_NAME)
            if (self.folder / INDEX_NAME).exists():  # it cannot be removed, so it is not looked at again
                self.folder = None

    def _remove(self, path: Path) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                path.with_name(path.name + suffix).unlink()


def _crc(*values: object) -> int:
    return zlib.crc32(repr(values).encode("utf-8", "surrogatepass"))


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The connection with its tables there; an index of another format version is emptied."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != _SCHEMA_VERSION:
        with connection:
            for table in ("files", "images", "entries"):
                connection.execute(f"DROP TABLE IF EXISTS {table}")
            connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    connection.executescript(_SCHEMA)
    return connection


def _read_only_copy(path: Path) -> sqlite3.Connection:
    """What stands in an index that cannot be opened for writing, copied to memory; empty if unreadable."""
    try:
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        # `immutable`: no lock file is made beside it, as a folder that cannot be written demands
        source = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
        with contextlib.closing(source):
            source.backup(memory)
        return _prepared(memory)
    except _DAMAGE:
        return _prepared(sqlite3.connect(":memory:", check_same_thread=False))
