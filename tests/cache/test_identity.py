from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyimg.cache.identity import file_identity
from hyimg.cache.index import Index
from hyimg.errors import HyimgError


def test_a_file_is_read_once_and_an_edited_one_again(tmp_path: Path, settle: Callable[[Path], None]) -> None:
    index = Index(tmp_path)
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"first")
    settle(model)
    read: list[int] = []
    assert file_identity(model, index, progress=read.append) == hashlib.sha256(b"first").hexdigest()
    assert file_identity(model, Index(tmp_path), progress=read.append) == hashlib.sha256(b"first").hexdigest()
    assert read == [5]
    model.write_bytes(b"other")
    assert file_identity(model, index, progress=read.append) == hashlib.sha256(b"other").hexdigest()


def test_a_file_replaced_by_one_of_equal_size_and_time_is_read_again(
    tmp_path: Path, settle: Callable[[Path], None]
) -> None:
    index = Index(tmp_path)
    model, new = tmp_path / "model.safetensors", tmp_path / "new"
    model.write_bytes(b"first")
    settle(model)
    file_identity(model, index)
    new.write_bytes(b"other")
    os.utime(new, ns=(model.stat().st_atime_ns, model.stat().st_mtime_ns))
    os.replace(new, model)
    assert file_identity(model, index) == hashlib.sha256(b"other").hexdigest()


def test_two_writes_within_one_tick_of_the_clock_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path)
    model = tmp_path / "model.safetensors"
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)  # a busy machine must not let the tick pass
    for clock in (now, now // 10**9 * 10**9):  # and one of whole seconds
        for data in (b"first", b"other"):
            model.write_bytes(data)
            os.utime(model, ns=(clock, clock))
            assert file_identity(model, index) == hashlib.sha256(data).hexdigest()


def test_a_folder_is_its_model_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "config.json", "README.md"):
        (tmp_path / name).write_text(name)
    before = file_identity(tmp_path)
    (tmp_path / "README.md").write_text("edited")
    assert file_identity(tmp_path) == before
    (tmp_path / "config.json").write_text("edited")
    assert file_identity(tmp_path) != before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(HyimgError, match="nowhere"):
        file_identity(tmp_path / "nowhere.safetensors")
    with pytest.raises(HyimgError, match="holds no"):
        file_identity(tmp_path)
