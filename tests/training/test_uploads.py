"""Uploads in the background: their order, who waits for them, and what ends a run without them."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from hyimg.errors import RunError
from hyimg.report import SilentReporter
from hyimg.training.hub import Repository, Uploads


class SlowHub:
    """A client of the hub whose commits end when they are let through."""

    def __init__(self):
        self.let_through = threading.Semaphore(0)
        self.sent = []

    def create_commit(self, repo_id, added, *, commit_message, repo_type):
        self.let_through.acquire()
        self.sent.append([operation.path_in_repo for operation in added])


@pytest.fixture
def case(tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file in files:
        file.write_bytes(b"weights")
    hub, report = SlowHub(), SilentReporter()
    uploads = Uploads(hub, Repository("me/cats", "model", "x"), report, states=False, in_background=True)
    return SimpleNamespace(files=files, folder=tmp_path, hub=hub, report=report, uploads=uploads)


def let_through_soon(hub, count):
    timer = threading.Timer(0.1, hub.let_through.release, args=(count,))
    timer.start()
    return timer


def test_a_file_is_waited_for_and_not_those_behind_it(case):
    for file in case.files:
        case.uploads.send_lora([file], case.folder)
    assert case.hub.sent == [], "training goes on"
    let_through_soon(case.hub, 2)
    case.uploads.wait_for(case.files[1])
    assert case.hub.sent == [["x/a.safetensors"], ["x/b.safetensors"]]
    case.uploads.wait_for(case.folder / "another.safetensors")
    case.hub.let_through.release()


@pytest.mark.parametrize("error", [None, RunError("diverged")])
def test_a_run_that_ends_in_order_waits_for_the_last(case, error):
    let_through_soon(case.hub, 3)
    try:
        with case.uploads:
            for file in case.files:
                case.uploads.send_lora([file], case.folder)
            if error is not None:
                raise error
    except RunError:
        pass
    assert [paths for (paths,) in case.hub.sent] == [f"x/{name}.safetensors" for name in "abc"]
    assert case.report.warnings == []


def test_a_run_that_is_cut_short_waits_for_none_and_says_which(case):
    def run():
        with case.uploads:
            for file in case.files:
                case.uploads.send_lora([file], case.folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    (warning,) = case.report.warnings
    assert warning.startswith("not uploaded, because the run was interrupted: ")
    assert all(str(file) in warning for file in case.files)


def test_states_go_only_where_they_are_asked_for(case):
    case.uploads.send_state(case.folder)
    with case.uploads:
        pass
    assert case.hub.sent == []


def test_a_wait_that_is_cut_short_says_what_is_left(case):
    def stop(*_):
        raise KeyboardInterrupt

    def run():
        with case.uploads:
            for file in case.files:
                case.uploads.send_lora([file], case.folder)
            case.hub.let_through.release()
            case.uploads.wait_for(case.files[0])
            case.uploads._pending[-1].over.wait = stop
            let_through_soon(case.hub, 1)

    with pytest.raises(KeyboardInterrupt):
        run()
    (warning,) = case.report.warnings
    assert warning == f"not uploaded, because the run was interrupted: `{case.files[2]}`"


def test_a_terminal_that_is_gone_keeps_nobody_waiting(case, monkeypatch):
    def gone(text):
        raise BrokenPipeError

    case.hub.let_through.release(2)
    monkeypatch.setattr(case.report, "note", gone)
    for file in case.files[:2]:
        case.uploads.send_lora([file], case.folder)
    waiting = threading.Thread(target=case.uploads.wait_for, args=(case.files[1],), daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()
    assert case.hub.sent == [["x/a.safetensors"], ["x/b.safetensors"]]
