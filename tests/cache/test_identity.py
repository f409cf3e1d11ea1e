from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyimg.cache.hashing import file_identity, fingerprint
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
    for clock in (time.time_ns(), time.time_ns() // 10**9 * 10**9):  # and one of whole seconds
        # stands still, since a busy machine may take longer than a tick for what follows
        monkeypatch.setattr("hyimg.cache.hashing.time.time_ns", lambda clock=clock: clock + 5_000_000)
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HyimgError, match="device or a pipe"):
        file_identity(tmp_path / "pipe")


def test_a_fingerprint_tells_checkpoints_apart_by_samples(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # 10 MB
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data)
    (tmp_path / "c").write_bytes(data[:-1])
    (tmp_path / "d").write_bytes(data[: len(data) // 2] + bytes(100_000) + data[len(data) // 2 + 100_000 :])
    prints = [fingerprint(tmp_path / name) for name in "abcd"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(data)
    assert len(fingerprint(tmp_path / "folder")) == 16
    with pytest.raises(HyimgError, match="cannot read"):
        fingerprint(tmp_path / "none")
