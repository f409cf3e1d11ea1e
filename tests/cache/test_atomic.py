from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hyimg.cache import atomic
from hyimg.cache.atomic import FileIsThereError, atomic_path, atomic_write_text, require_writable_folder
from hyimg.errors import HyimgError, RunError


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot flush folders")
def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    flush, replace = os.fsync, os.replace

    def watched_flush(descriptor: int) -> None:
        done.append(("flushed", os.fstat(descriptor).st_ino))
        flush(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        done.append(("renamed", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_flush)
    monkeypatch.setattr(os, "replace", watched_replace)
    target = tmp_path / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    file, folder = target.stat().st_ino, tmp_path.stat().st_ino
    assert done == [("flushed", file), ("renamed", file), ("flushed", folder)]
    done.clear()
    with atomic_path(target, durable=False) as temporary:
        temporary.write_text("made again if it is lost")
    assert done == [("renamed", target.stat().st_ino)]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_rubbish(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "a.txt"
    atomic_write_text(target, "old")
    with pytest.raises(type(failure)), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise failure
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_a_failed_run_and_an_unwritable_folder_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="disk is full"), atomic_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(HyimgError, match="cannot write `a`") as told, atomic_path(tmp_path / "a"):
        raise OSError(errno.EROFS, "Read-only file system")
    assert told.value.exit_code == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(HyimgError, match="in its place"):
        atomic_write_text(tmp_path / "file" / "a.txt", "text")


def test_a_folder_is_tried_before_long_work(tmp_path: Path) -> None:
    assert require_writable_folder(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    require_writable_folder(tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(HyimgError):
        require_writable_folder(tmp_path / "file")
    with pytest.raises(HyimgError, match="cannot write in the folder"):
        require_writable_folder(tmp_path / "file" / "run")
    with pytest.raises(HyimgError, match="too long"):
        require_writable_folder(tmp_path / "new" / ("x" * 300))
    with pytest.raises(HyimgError, match="cannot be the name"):
        require_writable_folder(tmp_path / "\ud800")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_nothing_but_a_file_is_replaced_and_a_link_stays_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in (("pipe", "a device or a pipe"), ("folder", "it is a folder")):
        with pytest.raises(HyimgError, match=reason):
            atomic_write_text(tmp_path / name, "text")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for text in ("first", "second"):
        atomic_write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == text
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(HyimgError, match="circle"):
        atomic_write_text(tmp_path / "circle", "text")


def test_every_failed_write_is_a_sentence(tmp_path: Path) -> None:
    for number in (errno.EIO, errno.EINVAL, errno.ENOENT):
        with (
            pytest.raises(HyimgError, match=f"cannot write `a` .*{os.strerror(number)}"),
            atomic_path(tmp_path / "a"),
        ):
            raise OSError(number, os.strerror(number))
    with pytest.raises(HyimgError, match="because of `source`"), atomic_path(tmp_path / "a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "source")
    with pytest.raises(HyimgError, match="too long"):
        atomic_write_text(tmp_path / ("x" * 300), "text")
    for name in ("\ud800", "a\0b"):
        with pytest.raises(HyimgError, match="cannot be the name"):
            atomic_write_text(tmp_path / name, "text")
    with pytest.raises(HyimgError, match="UTF-8"):
        atomic_write_text(tmp_path / "a", "\udcff")
    assert os.listdir(tmp_path) == []
    atomic_write_text(tmp_path / ("x" * 250), "as long as the file system takes")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_came_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def no_link(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(atomic.os, "link", no_link)
    target = tmp_path / "a.txt"
    atomic.atomic_write_bytes(target, b"first", replace=False)
    with pytest.raises(FileIsThereError, match="exists"):
        atomic.atomic_write_bytes(target, b"second", replace=False)
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.txt"]
