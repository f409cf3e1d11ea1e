"""`--num_processes N`: a stage in N processes of this machine.

    if asks_for_launch(config.processes.num_processes):
        return launch(cache_latents, config, report, num_processes=...)

Each process calls the stage again with its place in the environment, as torchrun and `accelerate launch`
would (`hyimg.memory.processes`), so a stage has one way of sharing work. The first error ends all of them
and is raised here. A process whose parent is killed ends itself. Ctrl-C and SIGTERM are handed on: a stage
that ends in order after the first one (training saves) does so here too; the second ends all at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, TypeVar

from hyimg.errors import FellowLostError, HyimgError, RunError, Terminated
from hyimg.memory.processes import Processes
from hyimg.report import ConsoleReporter, Reporter, SilentReporter

C = TypeVar("C")
T = TypeVar("T")
Stage = Callable[[C, Reporter], T]

_HOST = "127.0.0.1"
_SECONDS_TO_END = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HAS_SESSIONS = hasattr(os, "setsid")


def asks_for_launch(num_processes: int) -> bool:
    """Whether a stage is to start `num_processes` of itself; false in a process that a launcher started.

    Raises HyimgError where the launcher started another number.
    """
    world = Processes.current().world
    if world > 1 and num_processes not in (1, world):
        raise HyimgError(
            f"`--num_processes` is {num_processes}, and the launcher has started {world}",
            hint=f"give the same, `--num_processes {world}`, or leave it out where no run file says it",
        )
    return world == 1 and num_processes > 1


@dataclass(frozen=True)
class _Outcome:
    """How a process ended: its result and warnings, a user's error, or the traceback of a mistake of ours."""

    result: Any = None
    warnings: Sequence[str] = ()
    error: HyimgError | None = None
    trace: str | None = None
    is_consequence: bool = False
    """Whether the error only says that another process is gone."""


def launch(stage: Stage[C, T], config: C, report: Reporter, *, num_processes: int) -> T:
    """Runs `stage(config, ...)` in `num_processes` processes; what that of rank 0 returns.

    `stage` is a function of a module, `config` and the result can be pickled. Rank 0 reports: on a console
    of its own where `report` is one, else its warnings are handed on at the end. As always with fresh
    processes, a script that calls this does so under `if __name__ == "__main__":`.

    Raises the first error of any process, after ending the others, and RunError where one is killed.
    """
    from torch.distributed import TCPStore

    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    ends: list[Connection] = []
    relay = _Relay(processes)
    try:
        with relay:
            for rank in range(num_processes):
                receiving, sending = context.Pipe(duplex=False)
                environment = _environment(rank, num_processes, store.port)
                speaks = isinstance(report, ConsoleReporter)
                process = context.Process(
                    target=_run, args=(sending, environment, stage, config, speaks), name=f"hyimg-{rank}"
                )
                with _interrupts_kept():
                    process.start()
                processes.append(process)
                sending.close()  # so that a process that dies is an end of file here
                ends.append(receiving)
                if relay.signal is not None:  # it has not reached this process
                    raise relay.interruption
            outcomes = _collect(processes, ends, relay)
    finally:
        _end(processes)
    for warning in outcomes[0].warnings:
        report.warning(warning)
    result: T = outcomes[0].result
    return result


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


class _Relay:
    """Hands Ctrl-C and SIGTERM on to the processes in its block; `signal` is the first that came.

    The second raises KeyboardInterrupt or Terminated. Python hands signals to the main thread only; in
    another one the block changes nothing.
    """

    def __init__(self, processes: Sequence[SpawnProcess]) -> None:
        self.signal: signal.Signals | None = None
        self._processes = processes
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}

    def __exit__(self, *of_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise self.interruption
        self.signal = signal.Signals(number)
        for process in self._processes:
            # without sessions of their own (Windows) Ctrl-C has reached them already
            if process.pid is not None and process.is_alive() and _HAS_SESSIONS:
                os.kill(process.pid, number)

    @property
    def interruption(self) -> BaseException:
        return Terminated() if self.signal == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """A block in which a process that starts has Ctrl-C kept for it until it can answer (`_run`)."""
    if not _HAS_SESSIONS:
        yield
        return
    resource_tracker.ensure_running()  # its start would lift the mask, which the new process is to inherit
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(processes: Sequence[SpawnProcess], ends: Sequence[Connection], relay: _Relay) -> list[_Outcome]:
    """The outcomes by rank, once all are done. Raises the first error that is not the consequence of another."""
    outcomes: dict[int, _Outcome] = {}
    consequence: HyimgError | None = None
    while len(outcomes) < len(processes):
        waiting = [end for rank, end in enumerate(ends) if rank not in outcomes]
        ready = wait(waiting, _SECONDS_TO_END if consequence is not None else None)
        if not ready and consequence is not None:
            break
        for end in ready:
            rank = ends.index(end)
            try:
                outcome: _Outcome = ends[rank].recv()
            except EOFError:
                if relay.signal is not None:
                    raise relay.interruption from None
                raise _death(rank, processes) from None
            outcomes[rank] = outcome
            if outcome.is_consequence:
                consequence = outcome.error
            elif outcome.error is not None:
                raise outcome.error
            assert outcome.trace is None, f"process {rank} failed:\n{outcome.trace}"
    if consequence is not None:
        raise consequence
    return [outcomes[rank] for rank in range(len(processes))]


def _death(rank: int, processes: Sequence[SpawnProcess]) -> RunError:
    """The error for a process that ended without a word."""
    processes[rank].join(_SECONDS_TO_END)
    code = processes[rank].exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = "the system kills what takes too much memory; try fewer processes" if code == -9 else None
    return RunError(f"process {rank + 1} of {len(processes)} {how}", hint=hint)


def _end(processes: Sequence[SpawnProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + _SECONDS_TO_END
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _run(
    sending: Connection, environment: dict[str, str], stage: Stage[C, T], config: C, speaks: bool
) -> None:
    """One process: the stage, and its outcome into the pipe."""
    if _HAS_SESSIONS:
        os.setsid()  # the terminal's Ctrl-C is for the parent, which hands it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _share_the_cores(int(environment["WORLD_SIZE"]))
    silent = SilentReporter()
    main = environment["RANK"] == "0"
    try:
        if _HAS_SESSIONS:  # a Ctrl-C that came while this process was starting comes now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        result = stage(config, ConsoleReporter() if main and speaks else silent)
        outcome = _Outcome(result, silent.warnings) if main else _Outcome()
    except HyimgError as error:
        outcome = _Outcome(error=error, is_consequence=isinstance(error, FellowLostError))
    except (KeyboardInterrupt, Terminated):  # the parent knows
        return
    except Exception:
        outcome = _Outcome(trace=traceback.format_exc())
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # nothing is left that would have to end in order
    sending.send(outcome)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _share_the_cores(world: int) -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // world)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate, on a CPU, sets it otherwise
