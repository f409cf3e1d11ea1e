"""Output of the stages: notes, warnings and progress on stderr, results on stdout.

A stage takes a `Reporter`, so that it can run silently from Python, with live bars on a terminal, and with plain lines
in a pipe. Everything printed passes through here or `hyimg.cli` (a test checks it), since it may quote untrusted text:
lines are `shown`, consoles interpret no markup, JSON is ASCII.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from hyimg.errors import printable, shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.progress import Task as RichTask


def say(line: str = "") -> None:
    """Prints a line of a command's result to stdout."""
    print(shown(line), flush=True)


def say_json(value: object) -> None:
    """Prints a command's result to stdout as JSON, in ASCII without control characters."""
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))  # DEL, which JSON does not escape


def plain_console(*, stderr: bool = False, soft_wrap: bool = True) -> Console:
    """A console that prints text literally: no markup, and control characters escaped."""
    return _console_class()(stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **style: Any) -> Text:
            # also of a table's cells, before they are laid out
            return super().render_str(printable(text), **style)

    return PlainConsole


class Task(Protocol):
    """A running piece of work of known length."""

    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        """Counts `count` more units as done; `detail` is a short text shown below the bar."""


class Reporter(Protocol):
    """Where a stage's notes, warnings and progress go."""

    def note(self, text: str) -> None:
        """One line of information."""

    def warning(self, text: str) -> None:
        """One line that a user should act on; the same text is reported only once."""

    def task(
        self, title: str, total: int, *, unit: str = "it", done: int = 0
    ) -> AbstractContextManager[Task]:
        """Progress over `total` units, `done` of which are already complete; ends when the block ends."""


class _SilentTask:
    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        pass


class SilentReporter:
    """Prints nothing; keeps the warnings, for callers from Python."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "it", done: int = 0) -> Iterator[Task]:
        yield _SilentTask()


class ConsoleReporter:
    """Live bars on a terminal; elsewhere plain lines, at most one per task every `interval` seconds."""

    def __init__(self, console: Console | None = None, *, interval: float = 10.0) -> None:
        self.console = console or plain_console(stderr=True)
        self.interval = interval
        self._warned: set[str] = set()
        self._progress: Progress | None = None

    def note(self, text: str) -> None:
        self.console.print(shown(text), markup=False, emoji=False)

    def warning(self, text: str) -> None:
        from rich.text import Text

        if text not in self._warned:
            self._warned.add(text)
            self.console.print(Text.assemble(("warning: ", "yellow"), shown(text)))

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "it", done: int = 0) -> Iterator[Task]:
        """A task that begins while another one runs (samples during training) has its bar below it, while it lasts."""
        with ExitStack() as stack:
            is_inner = self._progress is not None
            progress = self._progress = self._progress or stack.enter_context(_progress(self.console))
            task = _Task(self, progress, title, total, unit, done)
            if is_inner:
                stack.callback(progress.remove_task, task.id)
            else:
                stack.callback(setattr, self, "_progress", None)
            yield task
            if not self.console.is_terminal:
                task.print_summary()


class _Task:
    """A task of rich's progress: a bar on a terminal, lines elsewhere."""

    def __init__(
        self, reporter: ConsoleReporter, progress: Progress, title: str, total: int, unit: str, done: int
    ) -> None:
        self._reporter, self._progress, self._title, self._done = reporter, progress, title, done
        self.id = progress.add_task(printable(title), total=total, completed=done, unit=unit, detail="")
        (self._task,) = (task for task in progress.tasks if task.id == self.id)
        self._started = self._printed = time.monotonic()

    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        fields: dict[str, Any] = {} if detail is None else {"detail": detail}
        self._progress.update(self.id, advance=count, **fields)
        now = time.monotonic()
        due = now - self._printed >= self._reporter.interval and not self._task.finished
        if due and not self._reporter.console.is_terminal:
            self._printed = now
            self._print(_pace_text(self._task))

    def print_summary(self) -> None:
        elapsed = time.monotonic() - self._started
        count = self._task.completed - self._done
        rate = rate_text(count / elapsed if elapsed > 0 else None, self._task.fields["unit"])
        self._print(f"{rate}, {duration_text(elapsed)}")

    def _print(self, pace: str) -> None:
        completed, total, detail = self._task.completed, self._task.total, self._task.fields["detail"]
        pace = f"{pace}, {detail}" if detail else pace
        self._reporter.note(f"{self._title}: {completed:.0f}/{total:.0f} ({pace})")


def show_python_plainly() -> None:
    """Escapes control characters in what Python itself writes to stderr: libraries' warnings, and tracebacks."""

    def warn(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,
        line: str | None = None,
    ) -> None:
        print(shown(f"{filename}:{lineno}: {category.__name__}: {message}"), file=sys.stderr)

    def trace(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        for line in "".join(traceback.format_exception(kind, error, where)).rstrip().split("\n"):
            print(printable(line), file=sys.stderr)

    class PlainFormatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return shown(super().format(record))

    warnings.showwarning = warn
    if logging.lastResort is not None:  # prints log messages of libraries that have no handler
        logging.lastResort.setFormatter(PlainFormatter())
    sys.excepthook = trace


def outlive_the_terminal() -> None:
    """Makes writes to stdout and stderr never fail, even if nobody can read them any more.

    After a terminal is closed, or the reader of a pipe has ended, every write raises OSError, which could end a run
    between two files of its last save. Streams that were closed from the start are opened on the null device: otherwise
    the first files that a command opens would get their numbers, and libraries that print would write into them.
    """
    _open_closed_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # neither a replaced stream nor a Windows console, which is not a file
        if not isinstance(stream, io.TextIOWrapper):
            continue
        buffer: object = stream.buffer
        raw: object = getattr(buffer, "raw", buffer)  # `python -u` has no buffer
        if type(raw) is not io.FileIO:
            continue
        stream.flush()
        unfailing = io.TextIOWrapper(
            io.BufferedWriter(_Unfailing(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=name == "stderr" or stream.line_buffering,
        )
        setattr(sys, name, unfailing)


def lost_output() -> OSError | None:
    """Why output was not written to stdout (a full disk); None if all was, or if nobody reads it."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Unfailing) else None
    return None if error is None or error.errno in _NOBODY_READS else error


# A pipe without a reader (on Windows EINVAL), a closed terminal, a closed descriptor
_NOBODY_READS = frozenset(
    (errno.EPIPE, errno.EIO, errno.EBADF, *((errno.EINVAL,) if sys.platform == "win32" else ()))
)


def _open_closed_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            assert opened == number
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            file = open(number, "rb" if name == "stdin" else "wb", closefd=False)  # noqa: SIM115
            setattr(sys, name, io.TextIOWrapper(file, "utf-8", "backslashreplace"))


class _Unfailing(io.FileIO):
    """A file whose writes never raise; `error` is the first that failed."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


# rich's estimate of the pace looks back this long, and at most at 1000 updates: there may be no step in its half minute
_PACE_SECONDS = 86400.0


def _progress(console: Console) -> Progress:
    """A line for each task, and its detail below, so that both fit a narrow terminal; nothing off a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class Pace(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            return Text(_pace_text(task).replace(",", ""))

    class Display(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if detail := task.fields["detail"]:
                    yield Text(f"  {printable(detail)}", no_wrap=True, overflow="ellipsis")

    return Display(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Pace(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=_PACE_SECONDS,
        get_time=lambda: time.monotonic(),
    )


def _pace_text(task: RichTask) -> str:
    """`4.1 s/step, 3:05 left`; dashes until the second update, since the first may include compiling."""
    left = duration_text(task.time_remaining) if task.time_remaining is not None else "-"
    return f"{rate_text(task.speed, task.fields['unit'])}, {left} left"


def rate_text(rate: float | None, unit: str) -> str:
    """`3.2 it/s`, or `4.1 s/it` below one per second; `- it/s` for an unknown rate."""
    if not rate:
        return f"- {unit}/s"
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit}"


def duration_text(seconds: float) -> str:
    """`42 s`, `3:05` (minutes) or `2:03:05` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size_text(num_bytes: float) -> str:
    """`512 B`, `3.4 MB`, `17.0 GB` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def count_text(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
