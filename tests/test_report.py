"""What a user sees while something works: a live display on a terminal, plain lines in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hyimg.report import ConsoleReporter, Pace


@pytest.fixture
def clock(monkeypatch):
    """Sets the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr("hyimg.report.time.monotonic", lambda: now[0])

    def set_to(seconds):
        now[0] = seconds

    return set_to


def test_a_pace_is_that_of_the_units_after_the_first(clock):
    pace = Pace(10)
    assert (pace.seconds_each, pace.seconds_left) == (0.0, 0.0)
    clock(100.0)
    pace.advance()
    assert pace.seconds_each == 100.0, "there is no other yet"
    clock(102.0)
    pace.advance()
    clock(106.0)
    pace.advance(2)
    assert (pace.seconds_each, pace.seconds_left) == (2.0, 12.0)


def on_terminal(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    return ConsoleReporter(console), console


def shown(console, since):
    return console.file.getvalue()[since:]


def test_a_narrow_terminal_shows_progress_and_detail_each_on_a_line(clock):
    report, console = on_terminal(80)
    with report.task("train", 400, unit="step", done=100) as task:
        for step in range(1, 5):
            clock(step * 10.0)
            task.advance(detail="epoch 1/9, loss 0.1234, lr 1.00e-04, grad 0.5, peak 11.0 GB")
    lines = [line.rstrip() for line in shown(console, 0).replace("\r", "\n").splitlines()]
    progress = [line for line in lines if "104/400" in line]
    assert progress
    assert progress[-1].endswith("104/400 10.0 s/step 49:20 left")
    assert "  epoch 1/9, loss 0.1234, lr 1.00e-04, grad 0.5, peak 11.0 GB" in lines


def test_a_task_within_a_task_is_shown_below_it_for_its_time():
    report, console = on_terminal(80)
    with report.task("train", 4) as train:
        with report.task("samples", 2) as samples:
            samples.advance()
            train_and_samples = [task.description for task in report._progress.tasks]
        train.advance()
        after = [task.description for task in report._progress.tasks]
    assert (train_and_samples, after) == (["train", "samples"], ["train"])
    assert report._progress is None
    assert "samples" in shown(console, 0)


def test_a_pipe_gets_plain_lines_now_and_then(clock):
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    report = ConsoleReporter(console, interval=10.0)
    with report.task("train", 4, unit="step") as task:
        for step in range(1, 5):
            clock(step * 8.0)
            task.advance(detail=f"loss {step}")
    assert console.file.getvalue().splitlines() == [
        "train: 2/4 (8.0 s/step, 16 s left, loss 2)",
        "train: 4/4 (8.0 s/step, 32 s, loss 4)",
    ]
