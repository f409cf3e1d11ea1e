from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hyimg.cache.atomic import sole_process
from hyimg.cache.own_files import LinkError
from hyimg.errors import HyimgError

BUSY = HyimgError("another process is at it")


def test_the_lock_is_for_one_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with sole_process(path, BUSY):
        with pytest.raises(HyimgError, match="at it"), sole_process(path, BUSY):
            pass
        assert path.exists()
    assert os.listdir(path.parent) == []
    path.write_text("")  # as a killed process leaves it
    with sole_process(path, BUSY):
        pass


def test_what_is_no_lock_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "nowhere").symlink_to(tmp_path / "new")
    (tmp_path / "folder").mkdir()
    for name, what in {"link": "a link", "nowhere": "a link", "folder": "a folder"}.items():
        with (
            pytest.raises(HyimgError, match=f"`.*/{name}` is {what}, and a lock file belongs there"),
            sole_process(tmp_path / name, BUSY),
        ):
            pass
    (tmp_path / "inner").symlink_to(tmp_path / "folder")
    with pytest.raises(LinkError), sole_process(tmp_path / "inner" / "lock", BUSY, root=tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["folder", "inner", "link", "nowhere", "victim"]


def as_another_user(function: Callable[[], None]) -> str:
    """Runs a function in a child process that may not do everything, and gives the message of its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            function()
            os.write(writer, b"fine")
        except BaseException as error:
            os.write(writer, (type(error).__name__ + ": " + str(error)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_file_that_may_not_be_written(tmp_path: Path) -> None:
    if os.getuid() == 0:
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    path = tmp_path / "shared" / "lock"

    def lock() -> None:
        with sole_process(path, BUSY):
            pass

    def left(mode: int) -> None:
        path.unlink(missing_ok=True)
        path.write_text("")
        path.chmod(mode)

    left(0o444)
    with path.open() as file:
        fcntl = pytest.importorskip("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is at it" in as_another_user(lock)
    left(0o444)
    assert as_another_user(lock) == "fine"
    assert os.listdir(path.parent) == []
    left(0o000)
    told = as_another_user(lock)
    assert told.startswith("HyimgError: cannot lock `")
    assert "hint: remove the file if no process uses it" in told
    if os.getuid() == 0:
        left(0o644)
        path.parent.chmod(0o1777)  # where only its owner may remove a file
        assert "it belongs to the user `root`" in as_another_user(lock)
