"""The index of a cache folder: what was once read, so that a warm start need not read it again.

An SQLite file that remembers

- of any file, by (path, size, mtime, inode): the hash of its content,
- of an image's content hash: its width and height as seen (after EXIF orientation),
- of a cache entry, by (size, mtime): that its checksum was right.

Nothing in it is a source of truth: a lost or damaged index costs time only, and is made anew. Several
processes may write it (WAL). In a folder that cannot be written it is used as it stands, and what is
learnt is kept in memory.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hyimg.cache.identity import FileStat

INDEX_NAME = "index.sqlite"

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    sha256 TEXT PRIMARY KEY, width INTEGER, height INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    folder TEXT, name TEXT, size INTEGER, mtime_ns INTEGER, PRIMARY KEY (folder, name)) WITHOUT ROWID;
"""
# another process may hold the write lock for as long as the system takes to flush
_BUSY_SECONDS = 20.0


class Index:
    """The index of one cache folder; `Index(None)` keeps everything in memory.

    Usable from several threads, picklable, and safe to carry over a fork: each process opens its own
    connection on first use.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._start()

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    # files ----------------------------------------------------------------------------------------------

    def content_hash(self, path: str, stat: FileStat) -> str | None:
        """The sha256 of the file's content if it is the very file that was hashed before."""
        row = self._row("SELECT size, mtime_ns, inode, sha256 FROM files WHERE path = ?", path)
        return row[3] if row is not None and FileStat(*row[:3]) == stat else None

    def remember_content_hash(self, path: str, stat: FileStat, sha256: str) -> None:
        self._write(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
            (path, stat.size, stat.mtime_ns, stat.inode, sha256),
        )

    # images ---------------------------------------------------------------------------------------------

    def image(self, path: str, stat: FileStat) -> tuple[str, tuple[int, int]] | None:
        """Content hash and (width, height) of an image file, if it is the very file that was read before."""
        row = self._row(
            "SELECT size, mtime_ns, inode, sha256, width, height FROM files JOIN images USING (sha256) "
            "WHERE path = ?",
            path,
        )
        return (row[3], (row[4], row[5])) if row is not None and FileStat(*row[:3]) == stat else None

    def image_size(self, sha256: str) -> tuple[int, int] | None:
        """(width, height) of the image with this content, known to be readable."""
        row = self._row("SELECT width, height FROM images WHERE sha256 = ?", sha256)
        return None if row is None else (row[0], row[1])

    def remember_image_size(self, sha256: str, size: tuple[int, int]) -> None:
        self._write("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", (sha256, *size))

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

    def _row(self, query: str, *values: object) -> tuple[Any, ...] | None:
        rows = self._rows(query, *values)
        return rows[0] if rows else None

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._open().execute(query, values).fetchall()
            except sqlite3.DatabaseError:
                self._recover()
                return self._open().execute(query, values).fetchall()

    def _write(self, statement: str, *rows: tuple[object, ...]) -> None:
        # to forget is always right, so trouble with writing (disk full, a lock held for a minute) is no error
        with self._lock, contextlib.suppress(sqlite3.Error):
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
        except sqlite3.DatabaseError:
            self._remove(path)
            try:
                return self._connect_file(path)
            except (sqlite3.Error, OSError):
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
        if self.folder is not None:
            self._remove(self.folder / INDEX_NAME)

    def _remove(self, path: Path) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                path.with_name(path.name + suffix).unlink()


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
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    with contextlib.suppress(sqlite3.Error):
        # `immutable`: no lock file is made beside it, as a folder that cannot be written demands
        source = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
        with contextlib.closing(source):
            source.backup(memory)
    return _prepared(memory)
