"""One figure of a benchmark, what a part is told, and how the cost of a command line is measured."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
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


def each_apart(function: Callable[..., Iterator[Any]], *arguments: object) -> Iterator[Any]:
    """Calls a generator function of a module in its own process, and yields each answer as soon as it is there.

    Raises RuntimeError with the text of its error, or if the process is ended from outside (out of host memory).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_each, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        while True:
            kind, answer = receiver.recv()
            if kind == "error":
                raise RuntimeError(answer)
            yield answer
    except EOFError:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the process ended with {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()


def _send_each(sender: Any, function: Callable[..., Iterator[Any]], arguments: tuple[object, ...]) -> None:
    try:
        for answer in function(*arguments):
            sender.send(("answer", answer))
    except Exception as error:
        traceback.print_exc()
        sender.send(("error", str(error) or type(error).__name__))


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
