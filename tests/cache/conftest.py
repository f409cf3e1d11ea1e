"""Shared by the tests of the cache room."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def settle() -> Callable[[Path], None]:
    """Dates a file back by a minute: what was written long enough ago may be remembered by its mtime."""

    def date_back(path: Path) -> None:
        past = time.time_ns() - 60_000_000_123
        os.utime(path, ns=(past, past))

    return date_back


@pytest.fixture
def without_write_permission(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path, Callable[[], bool]], bool]:
    """Runs a function in a child process that may read a folder but not write it, and gives its answer."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")

    def run(folder: Path, function: Callable[[], bool]) -> bool:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        for parent in folder.parents:
            if parent.stat().st_uid == os.getuid() and parent.is_relative_to(tmp_path_factory.getbasetemp()):
                parent.chmod(0o755)
        for parent in [tmp_path_factory.getbasetemp(), *tmp_path_factory.getbasetemp().parents]:
            if parent.name.startswith(("pytest-", "popen-")):  # pytest's own, closed to other users
                parent.chmod(0o755)
        child = os.fork()
        if child == 0:
            answer = False
            try:
                if os.getuid() == 0:  # permissions do not bind root
                    os.setgid(65534)
                    os.setuid(65534)
                answer = function()
            finally:
                os._exit(0 if answer else 1)
        _, status = os.waitpid(child, 0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        return os.waitstatus_to_exitcode(status) == 0

    return run
