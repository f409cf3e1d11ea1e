"""What a stage tells its user while it works: notes, warnings and progress, all on stderr.

A stage takes a `Reporter`, so that it can be called from Python silently, from a terminal with live bars and
from a pipe with plain lines. Data that a program may read goes to stdout and is not this module's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress


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
        self._progress: Progress | None = None

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
        """A bar; one that begins while another is shown (samples in training) stands below it for its time."""
        if self._progress is not None:
            task = _BarTask(self._progress, title, total, unit, done)
            try:
                yield task
            finally:
                task.remove()
            return
        self._progress = _display(self.console)
        try:
            with self._progress:
                yield _BarTask(self._progress, title, total, unit, done)
        finally:
            self._progress = None


def _display(console: Console) -> Progress:
    """A line of progress a task, and below them what each has to tell, so that both fit a narrow terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    class Display(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if detail := task.fields["detail"]:
                    yield Text(f"  {detail}", no_wrap=True, overflow="ellipsis")

    return Display(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        console=console,
    )


class Pace:
    """How fast a piece of work goes that has `num_left` units left.

    What comes before the end of its first unit (compiling, filling buffers) counts only until there is a second.
    """

    def __init__(self, num_left: int) -> None:
        self._left = num_left
        self._since, self._count = time.monotonic(), 0
        self._is_under_way = False
        self.seconds_each = 0.0
        """Seconds a unit; 0 before the first."""

    def advance(self, count: int = 1) -> None:
        """Says that `count` more units are done."""
        now = time.monotonic()
        self._left -= count
        self._count += count
        self.seconds_each = (now - self._since) / max(self._count, 1)
        if not self._is_under_way:
            self._is_under_way, self._since, self._count = True, now, 0

    @property
    def seconds_left(self) -> float:
        """How long the rest takes at this pace; 0 before the first unit."""
        return max(self._left, 0) * self.seconds_each


class _BarTask:
    """A line of a display: taken off with `remove`, where others stand on it too."""

    def __init__(self, progress: Progress, title: str, total: int, unit: str, done: int) -> None:
        self._progress, self._unit = progress, unit
        self._number = progress.add_task(title, total=total, completed=done, rate="", left="", detail="")
        self._pace = Pace(total - done)

    def remove(self) -> None:
        self._progress.remove_task(self._number)

    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        self._pace.advance(count)
        # rich's own estimate looks back half a minute, in which there may be no step
        fields: dict[str, Any] = {
            "rate": rate_text(1, self._pace.seconds_each, self._unit),
            "left": f"{duration_text(self._pace.seconds_left)} left",
        }
        fields |= {"detail": detail} if detail is not None else {}
        self._progress.update(self._number, advance=count, **fields)


class _PlainTask:
    def __init__(self, reporter: ConsoleReporter, title: str, total: int, unit: str, done: int) -> None:
        self._reporter, self._title, self._total, self._unit = reporter, title, total, unit
        self._done, self._count, self._detail = done, 0, ""
        self._pace = Pace(total - done)
        self._started = self._printed = time.monotonic()

    def advance(self, count: int = 1, *, detail: str | None = None) -> None:
        self._done += count
        self._count += count
        self._pace.advance(count)
        self._detail = detail if detail is not None else self._detail
        now = time.monotonic()
        if now - self._printed >= self._reporter.interval and self._done < self._total:
            self._printed = now
            rate = rate_text(1, self._pace.seconds_each, self._unit)
            self._say(f"{rate}, {duration_text(self._pace.seconds_left)} left")

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
