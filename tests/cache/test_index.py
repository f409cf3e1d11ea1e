from __future__ import annotations

import os
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from hyimg.cache.hashing import FileStat
from hyimg.cache.index import INDEX_NAME, Index
from hyimg.errors import HyimgError

STAT = FileStat(size=3, mtime_ns=5, inode=7)


def test_what_is_remembered_lasts_and_is_shared(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index.remember_content_hash("/a", STAT, "ab")
    index.remember_image_size("ab", (640, 480))
    for other in (Index(tmp_path), pickle.loads(pickle.dumps(index))):
        assert other.images(["/a", "/b"]) == {"/a": (STAT, "ab", (640, 480))}
        assert other.content_hash("/a", STAT) == "ab"
        assert other.content_hash("/a", FileStat(3, 6, 7)) is None
        assert other.content_hash("/b", STAT) is None


def test_many_paths_are_asked_for_at_once(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index.remember_image_size("ab", (640, 480))
    paths = [f"/{number}" for number in range(2500)]
    for path in paths[::100]:
        index.remember_content_hash(path, STAT, "ab")
    assert set(index.images(paths)) == set(paths[::100])


def test_a_flipped_bit_never_gives_a_wrong_answer(tmp_path: Path) -> None:
    """SQLite has no checksums: a flipped bit in a width would stretch an image, unseen."""
    index = Index(tmp_path)
    for number in range(40):
        index.remember_content_hash(f"/{number}", STAT, f"{number:02}" * 32)
        index.remember_image_size(f"{number:02}" * 32, (640 + number, 480))
    index.close()
    path = tmp_path / INDEX_NAME
    whole = path.read_bytes()
    paths = [f"/{number}" for number in range(40)]
    lost = 0
    for place in range(100, len(whole), 41):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        index = Index(tmp_path)
        known = index.images(paths)
        for name, (stat, sha256, size) in known.items():
            if stat == STAT:  # another one would count as an edited file
                assert (sha256, size) == (f"{int(name[1:]):02}" * 32, (640 + int(name[1:]), 480))
        for number, name in enumerate(paths):
            assert index.content_hash(name, STAT) in (None, f"{number:02}" * 32)
        lost += len(known) < 40
        index.close()
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert lost > 20


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    first = Index(tmp_path)
    first.remember_content_hash("/a", STAT, "ab")
    first.close()
    for rubbish in (b"rubbish" * 1000, b""):
        (tmp_path / INDEX_NAME).write_bytes(rubbish)
        index = Index(tmp_path)
        assert index.content_hash("/a", STAT) is None
        index.remember_content_hash("/a", STAT, "ab")
        index.close()
        again = Index(tmp_path)
        assert again.content_hash("/a", STAT) == "ab"
        again.close()


def test_an_index_damaged_in_use_forgets_and_goes_on(tmp_path: Path) -> None:
    index = Index(tmp_path)
    for number in range(500):
        index.remember_content_hash(f"/{number}", STAT, "ab" * 32)
    index.close()
    path = tmp_path / INDEX_NAME
    data = bytearray(path.read_bytes())
    data[4096:] = b"\x99" * (len(data) - 4096)  # the first page, with the schema, stays
    path.write_bytes(data)
    assert index.content_hash("/3", STAT) is None
    index.remember_content_hash("/3", STAT, "cd")
    assert index.content_hash("/3", STAT) == "cd"


def test_a_folder_that_cannot_be_written_serves_what_it_holds(
    tmp_path: Path, without_write_permission: Callable[[Path, Callable[[], bool]], bool]
) -> None:
    folder = tmp_path / "cache"
    index = Index(folder)
    index.remember_content_hash("/a", STAT, "ab")
    index.close()

    def reads_and_learns_in_memory() -> bool:
        there = Index(folder)
        there.remember_content_hash("/b", STAT, "cd")
        return there.content_hash("/a", STAT) == "ab"

    assert without_write_permission(folder, reads_and_learns_in_memory)
    assert Index(folder).content_hash("/b", STAT) is None


def test_threads_share_an_index(tmp_path: Path) -> None:
    index = Index(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: index.remember_content_hash(f"/{n}", STAT, str(n)), range(100)))
        assert list(pool.map(lambda n: index.content_hash(f"/{n}", STAT), range(100))) == [
            str(n) for n in range(100)
        ]


@pytest.mark.parametrize("application_id", [0, 77])
@pytest.mark.parametrize("table", ["notes (text)", "files (path, size)"])
def test_the_database_of_another_program_stays_as_it_is(
    tmp_path: Path, application_id: int, table: str
) -> None:
    path = tmp_path / INDEX_NAME
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"CREATE TABLE {table}")
        other.execute(f"PRAGMA application_id = {application_id}")
        other.commit()
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(HyimgError, match="another program's database") as told:
            Index(tmp_path).remember_image_size("ab", (640, 480))
        assert told.value.exit_code == 2
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {INDEX_NAME: before}


def test_the_log_of_another_program_that_was_killed_is_left_to_it(tmp_path: Path) -> None:
    """Opening such a database, and closing it, would write what the log holds into the file, and remove the log."""
    (tmp_path / "cache").mkdir()
    with closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE notes (text)")
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        other.execute("INSERT INTO notes VALUES ('theirs')")
        other.commit()
        for suffix in ("", "-wal"):
            shutil.copy(tmp_path / f"other{suffix}", tmp_path / "cache" / f"{INDEX_NAME}{suffix}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert before[f"{INDEX_NAME}-wal"]
    with pytest.raises(HyimgError, match="another program's database"):
        Index(tmp_path / "cache").images(["/a"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


def test_what_another_program_has_not_yet_moved_out_of_its_log_counts(tmp_path: Path) -> None:
    path = tmp_path / INDEX_NAME
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE notes (text)")
        with pytest.raises(HyimgError, match="another program's database"):
            Index(tmp_path).images(["/a"])
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("notes",)]


@pytest.mark.parametrize("version", [2, 3])
def test_an_index_of_an_older_release_is_taken_over(tmp_path: Path, version: int) -> None:
    index = Index(tmp_path)
    index.remember_content_hash("/a", STAT, "ab")
    index.close()
    with closing(sqlite3.connect(tmp_path / INDEX_NAME)) as older:
        older.execute("PRAGMA application_id = 0")
        older.execute(f"PRAGMA user_version = {version}")
        older.execute("ALTER TABLE traits RENAME TO masks") if version == 2 else None
        older.commit()
    known = Index(tmp_path).content_hash("/a", STAT)
    assert known == (None if version == 2 else "ab")
    with closing(sqlite3.connect(tmp_path / INDEX_NAME)) as now:
        assert now.execute("PRAGMA application_id").fetchone() == (int.from_bytes(b"hymi", "big"),)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_a_link_in_place_of_the_index_is_replaced(tmp_path: Path, suffix: str) -> None:
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    cache.mkdir()
    with closing(sqlite3.connect(victim)) as other:
        other.execute("CREATE TABLE notes (text)")
        other.commit()
    before = victim.read_bytes()
    (cache / (INDEX_NAME + suffix)).symlink_to(victim)
    index = Index(cache)
    index.remember_content_hash("/a", STAT, "ab")
    assert index.content_hash("/a", STAT) == "ab"
    index.close()
    assert victim.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "victim"]
    assert not (cache / INDEX_NAME).is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_pipe_in_place_of_the_index_is_left_alone(tmp_path: Path, suffix: str) -> None:
    pipe = tmp_path / (INDEX_NAME + suffix)
    os.mkfifo(pipe)
    index = Index(tmp_path)
    index.remember_content_hash("a.png", FileStat(1, 2, 3), "abc")  # opening the pipe would wait for ever
    assert index.content_hash("a.png", FileStat(1, 2, 3)) == "abc"
    assert pipe.is_fifo()
