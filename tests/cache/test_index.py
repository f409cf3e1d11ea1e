from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hyimg.cache.identity import FileStat
from hyimg.cache.index import INDEX_NAME, Index

STAT = FileStat(size=3, mtime_ns=5, inode=7)


def test_what_is_remembered_lasts_and_is_shared(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index.remember_content_hash("/a", STAT, "ab")
    index.remember_image_size("ab", (640, 480))
    for other in (Index(tmp_path), pickle.loads(pickle.dumps(index))):
        assert other.image("/a", STAT) == ("ab", (640, 480))
        assert other.image("/a", FileStat(3, 6, 7)) is None
        assert other.content_hash("/b", STAT) is None


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
