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
