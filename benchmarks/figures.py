"""One figure of a benchmark, what a part is told, and how the cost of a command line is measured."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HYIMG = [sys.executable, "-m", "hyimg"]


@dataclass(frozen=True)
class Figure:
    """One row: what, how much, and what it is compared with; `values` are for programs that read the JSON."""

    name: str
    seconds: float | None = None
    peak_mb: float | None = None
    beside: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What the command line asks of a part. `scratch` is an empty folder, `runs` the counted runs of a figure.

    `toy` takes the smallest sizes that go through the same code: it shows that a part works and measures nothing.
    `only` is what the names of configurations must have in them, in the parts whose configurations take long.
    """

    scratch: Path
    runs: int = 3
    device: str = "cpu"
    toy: bool = False
    only: str = ""


def apart(function: Callable[..., Any], *arguments: object, **named: object) -> Any:
    """Calls a function of a module in a process of its own, and gives its answer.

    What imports torch must not run here: a command's peak would begin with this process's size, which the
    system counts until the command itself starts.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result()


def command(name: str, arguments: list[str], runs: int, beside: str = "") -> Figure:
    """The median time and memory of a command line."""
    peaks = []

    def run() -> None:
        done = subprocess.Popen([*HYIMG, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(done.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, arguments
        peaks.append(peak_mb(usage))

    seconds = median(run, runs)
    return Figure(name, seconds, statistics.median(peaks), beside)


def median(run: Callable[[], object], runs: int, *, warm: bool = False) -> float:
    """Median seconds of so many runs, after one that does not count where all is not `warm` yet."""
    if not warm:
        run()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_mb(usage: resource.struct_rusage) -> float:
    # Linux counts kilobytes, macOS bytes
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
