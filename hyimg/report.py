"""What a stage tells its user while it works: notes, warnings and progress, all on stderr.

A stage takes a `Reporter`, so that it can be called from Python silently, from a terminal with live bars and
from a pipe with plain lines. Data that a program may read goes to stdout and is not this module's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Task(Protocol):
    """A running piece of work of known length."""

    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        """Says that `count` more units are done; `detail` is a short text shown beside the bar."""


class Reporter(Protocol):
    """Where a stage's notes, warnings and progress go."""

    def note(self, text: str) -> None:
        """One line that a user may like to know."""

    def warning(self, text: str) -> None:
        """One line that a user should act on."""

    def task(
        self, title: str, total: int, *, unit: str = "it", done: int = 0
    ) -> AbstractContextManager[Task]:
        """Progress over `total` units, of which `done` were there before; ends when the block ends."""


class _SilentTask:
    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        pass


class SilentReporter:
    """Says nothing; keeps the warnings, for callers from Python."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "it", done: int = 0) -> Iterator[Task]:
        yield _SilentTask()


class OnceReporter:
    """Passes everything on, each warning once: for stages that look at the same dataset one after another."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def warning(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._reporter.warning(text)

    def task(
        self, title: str, total: int, *, unit: str = "it", done: int = 0
    ) -> AbstractContextManager[Task]:
        return self._reporter.task(title, total, unit=unit, done=done)


class ConsoleReporter:
    """Rich bars on a terminal, plain lines (at most one every `interval` seconds a task) when piped."""

    def __init__(self, console: Console | None = None, *, interval: float = 10.0) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.interval = interval

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warning(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble(("warning: ", "yellow"), text))

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "it", done: int = 0) -> Iterator[Task]:
        if self.console.is_terminal:
            with self._bar(title, total, unit, done) as task:
                yield task
        else:
            lines = _PlainTask(self, title, total, unit, done)
            yield lines
            lines.finish()

    @contextmanager
    def _bar(self, title: str, total: int, unit: str, done: int) -> Iterator[Task]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            number = progress.add_task(title, total=total, completed=done, rate="", detail="")
            yield _BarTask(progress, number, unit)


class _BarTask:
    def __init__(self, progress: object, number: object, unit: str) -> None:
        from rich.progress import Progress, TaskID

        assert isinstance(progress, Progress)
        assert isinstance(number, int)
        self._progress, self._number, self._unit = progress, TaskID(number), unit
        self._started, self._count = time.monotonic(), 0

    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        self._count += count
        rate = rate_text(self._count, time.monotonic() - self._started, self._unit)
        if detail is None:
            self._progress.update(self._number, advance=count, rate=rate)
        else:
            self._progress.update(self._number, advance=count, rate=rate, detail=detail)


class _PlainTask:
    def __init__(self, reporter: ConsoleReporter, title: str, total: int, unit: str, done: int) -> None:
        self._reporter, self._title, self._total, self._unit = reporter, title, total, unit
        self._done, self._count, self._detail = done, 0, ""
        self._started = self._printed = time.monotonic()

    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        self._done += count
        self._count += count
        self._detail = detail if detail is not None else self._detail
        now = time.monotonic()
        if now - self._printed >= self._reporter.interval and self._done < self._total:
            self._printed = now
            elapsed = now - self._started
            left = (self._total - self._done) * elapsed / max(self._count, 1)
            self._say(f"{rate_text(self._count, elapsed, self._unit)}, {duration_text(left)} left")

    def finish(self) -> None:
        elapsed = time.monotonic() - self._started
        self._say(f"{rate_text(self._count, elapsed, self._unit)}, {duration_text(elapsed)}")

    def _say(self, tail: str) -> None:
        detail = f", {self._detail}" if self._detail else ""
        self._reporter.note(f"{self._title}: {self._done}/{self._total} ({tail}{detail})")


def rate_text(count: int, seconds: float, unit: str) -> str:
    """`3.2 it/s`, or `4.1 s/it` where that reads better."""
    if count == 0 or seconds <= 0:
        return f"- {unit}/s"
    rate = count / seconds
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
