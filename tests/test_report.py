"""What a user sees while something works: a live display on a terminal, plain lines in a pipe."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from hyimg import errors
from hyimg.errors import printable
from hyimg.report import ConsoleReporter, plain_console, say_json, show_python_plainly


@pytest.fixture
def clock(monkeypatch):
    """Sets the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr("hyimg.report.time.monotonic", lambda: now[0])

    def set_to(seconds):
        now[0] = seconds

    return set_to


def on_terminal(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    return ConsoleReporter(console), console


def shown(console, since):
    return console.file.getvalue()[since:]


def test_a_narrow_terminal_shows_progress_and_detail_each_on_a_line(clock):
    report, console = on_terminal(80)
    with report.task("train", 400, unit="step", done=100) as task:
        for seconds in (
            500.0,
            560.0,
            620.0,
            680.0,
        ):  # the first step compiles; the others are over rich's 30 s apart
            clock(seconds)
            task.advance(detail="epoch 1/9, loss 0.1234, lr 1.00e-04, grad 0.5, peak 11.0 GB")
    lines = [line.rstrip() for line in shown(console, 0).replace("\r", "\n").splitlines()]
    progress = [line for line in lines if "104/400" in line]
    assert progress
    assert progress[-1].endswith("104/400 60.0 s/step 4:56:00 left")
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


def test_a_warning_is_shown_once():
    console = Console(file=io.StringIO(), width=200)
    report = ConsoleReporter(console)
    for text in ("a", "b", "a"):
        report.warning(text)
    assert console.file.getvalue() == "warning: a\nwarning: b\n"


def test_strangers_text_is_plain_in_notes_bars_and_tables():
    hostile = "x\nerror: forged\x1b[99X\u202e[bold]:cat:"
    spelt_out = r"x\nerror: forged\x1b[99X\u202e[bold]:cat:"
    for is_terminal in (False, True):
        console = plain_console()
        console.file, console._force_terminal, console.width = io.StringIO(), is_terminal, 200
        report = ConsoleReporter(console, interval=0)
        report.note(hostile)
        report.warning(hostile)
        with report.task(hostile, 2) as task:
            task.advance(detail=hostile)
        table = Table(hostile)
        table.add_row(hostile)
        console.print(table)
        text = console.file.getvalue()
        assert text.count(spelt_out) >= 6
        assert "forged\x1b" not in text
        assert "\nerror" not in text


def test_an_answer_in_json_is_ascii_without_control_characters(capsys):
    hostile = "x\x7f\x9b\u202e\udcff\n"
    say_json({hostile: hostile})
    text = capsys.readouterr().out
    assert printable(text.replace("\n", "")) == text.replace("\n", "")
    assert text.isascii()
    assert json.loads(text) == {hostile: hostile}


def test_warnings_and_tracebacks_of_libraries_are_plain(monkeypatch, capsys):
    monkeypatch.setattr("warnings.showwarning", None)
    monkeypatch.setattr("sys.excepthook", None)
    show_python_plainly()
    hostile = "x\x1b[99X\u202e"
    warnings.showwarning(UserWarning(f"{hostile}\nerror: forged"), UserWarning, "file.py", 3)
    try:
        raise ValueError(hostile)
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    record = logging.LogRecord(
        "library", logging.WARNING, "file.py", 3, f"{hostile}\nerror: forged", None, None
    )
    assert logging.lastResort.format(record) == r"x\x1b[99X\u202e\nerror: forged"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == r"file.py:3: UserWarning: x\x1b[99X\u202e\nerror: forged"
    assert lines[-1] == r"ValueError: x\x1b[99X\u202e"


# The edge of the command line prints errors and help; what a session answers is a blank line; the micro model's
# builder is a tool of ours
PRINTS = {
    "report.py",
    "cli/app.py",
    "cli/typer_app.py",
    "rendering/interactive.py",
    "benchmarks/micro/__main__.py",
}


def test_nothing_else_prints():
    hyimg = Path(errors.__file__).parent
    for path in hyimg.rglob("*.py"):
        calls = [
            ast.unparse(n.func)
            for n in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(n, ast.Call)
        ]
        printing = {"print", "typer.echo", "Console", "json.dump", "sys.stdout.write", "sys.stderr.write"} & {
            *calls
        }
        assert not printing or path.relative_to(hyimg).as_posix() in PRINTS, f"{path}: {printing}"
