from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hyimg.cache.atomic import atomic_path, atomic_write_text, require_writable_folder
from hyimg.errors import HyimgError, RunError


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["a.txt"]


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
    assert require_writable_folder(tmp_path / "run").is_dir()
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(HyimgError):
        require_writable_folder(tmp_path / "file")
