"""`--num_processes N`: a stage in N processes of this machine.

    if asks_for_launch(config.processes.num_processes):
        return launch(cache_latents, config, report, num_processes=...)

Each process calls the stage again with its place in the environment, as torchrun and `accelerate launch`
would (`hyimg.memory.processes`), so a stage has one way of sharing work. The first error ends all of them
and is raised here. A process whose parent is killed ends itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from hyimg.errors import HyimgError, RunError
from hyimg.memory.processes import Processes
from hyimg.report import ConsoleReporter, Reporter, SilentReporter

C = TypeVar("C")
T = TypeVar("T")
Stage = Callable[[C, Reporter], T]

_HOST = "127.0.0.1"
_SECONDS_TO_END = 5.0


def asks_for_launch(num_processes: int) -> bool:
    """Whether a stage is to start `num_processes` of itself; false in a process that a launcher started.

    Raises HyimgError where the launcher started another number.
    """
    world = Processes.current().world
    if world > 1 and num_processes not in (1, world):
        raise HyimgError(
            f"`--num_processes` is {num_processes}, and the launcher has started {world}",
            hint="leave `--num_processes` out under a launcher",
        )
    return world == 1 and num_processes > 1


@dataclass(frozen=True)
class _Outcome:
    """How a process ended: its result and warnings, a user's error, or the traceback of a mistake of ours."""

    result: Any = None
    warnings: Sequence[str] = ()
    error: HyimgError | None = None
    trace: str | None = None


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
    try:
        for rank in range(num_processes):
            receiving, sending = context.Pipe(duplex=False)
            environment = _environment(rank, num_processes, store.port)
            speaks = isinstance(report, ConsoleReporter)
            process = context.Process(
                target=_run, args=(sending, environment, stage, config, speaks), name=f"hyimg-{rank}"
            )
            process.start()
            sending.close()  # so that a process that dies is an end of file here
            processes.append(process)
            ends.append(receiving)
        outcomes = _collect(processes, ends)
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


def _collect(processes: Sequence[SpawnProcess], ends: Sequence[Connection]) -> list[_Outcome]:
    """The outcomes by rank, once all are done. Raises the first error."""
    outcomes: dict[int, _Outcome] = {}
    while len(outcomes) < len(processes):
        for end in wait([end for rank, end in enumerate(ends) if rank not in outcomes]):
            rank = ends.index(end)
            try:
                outcome: _Outcome = ends[rank].recv()
            except EOFError:
                raise _death(rank, processes) from None
            if outcome.error is not None:
                raise outcome.error
            assert outcome.trace is None, f"process {rank} failed:\n{outcome.trace}"
            outcomes[rank] = outcome
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
    for process in processes:
        process.join(_SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _run(
    sending: Connection, environment: dict[str, str], stage: Stage[C, T], config: C, speaks: bool
) -> None:
    """One process: the stage, and its outcome into the pipe."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _share_the_cores(int(environment["WORLD_SIZE"]))
    silent = SilentReporter()
    main = environment["RANK"] == "0"
    try:
        result = stage(config, ConsoleReporter() if main and speaks else silent)
        outcome = _Outcome(result, silent.warnings) if main else _Outcome()
    except HyimgError as error:
        outcome = _Outcome(error=error)
    except KeyboardInterrupt:  # the parent has it too
        return
    except Exception:
        outcome = _Outcome(trace=traceback.format_exc())
    sending.send(outcome)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _share_the_cores(world: int) -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
