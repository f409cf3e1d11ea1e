"""`--num_processes N`: runs a stage in N processes on this machine. Also runs a command in a child process.

    if asks_for_launch(config.processes.num_processes):
        return launch(cache_latents, config, report, num_processes=...)

Each process calls the stage again, with RANK and WORLD_SIZE in its environment as torchrun and `accelerate launch`
set them (`hyimg.distributed.processes`). The first error ends all processes and is raised here; a process whose parent
is killed ends itself. Ctrl-C, SIGTERM and SIGHUP are forwarded, so that training saves on the first; a second one ends
all at once.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil

from hyimg.cache.own_files import try_lock
from hyimg.distributed.processes import STORE_FILE, Processes, is_repetition, stop_signals
from hyimg.errors import HyimgError, PeerProcessLostError, RunError, Terminated, system_limit
from hyimg.import_path import keep_working_folder_out_of_children, python_command
from hyimg.report import ConsoleReporter, Reporter, SilentReporter, outlive_the_terminal, show_python_plainly

C = TypeVar("C")
T = TypeVar("T")
Stage = Callable[[C, Reporter], T]

_HOST = "127.0.0.1"
_SECONDS_TO_END = 5.0
_FOLDER_PREFIX, _LOCK_FILE = "hyimg-processes-", "lock"
# The longest time between creating the folder and locking it
_SECONDS_TO_LOCK = 60.0
_HAS_SESSIONS = hasattr(os, "setsid")


def asks_for_launch(num_processes: int) -> bool:
    """Whether a stage should launch `num_processes`; false in a process that a launcher started.

    Raises HyimgError if the launcher started another number.
    """
    world = Processes.current().world
    if world > 1 and num_processes not in (1, world):
        raise HyimgError(
            f"`--num_processes` is {num_processes}, but the launcher started {world} processes",
            hint=f"use `--num_processes {world}`, or remove it from the command and the run file",
        )
    return world == 1 and num_processes > 1


@dataclass(frozen=True)
class _Outcome:
    """How a process ended: its result and warnings, a HyimgError, or the traceback of an internal error."""

    result: Any = None
    warnings: Sequence[str] = ()
    error: HyimgError | None = None
    trace: str | None = None
    is_consequence: bool = False
    """Whether the error was caused by the end of another process."""


def launch(stage: Stage[C, T], config: C, report: Reporter, *, num_processes: int) -> T:
    """Runs `stage(config, ...)` in `num_processes` processes; returns rank 0's result.

    `stage` must be a module's function, and `config` and the result picklable. Rank 0 reports to the console if
    `report` is one; otherwise its warnings are reported at the end. A script must call this under
    `if __name__ == "__main__":`, as always when processes are spawned.

    Raises the first error of any process after ending the others, and RunError if one is killed.
    """
    keep_working_folder_out_of_children()
    with _private_folder() as folder:
        outcomes = _run_all(stage, config, isinstance(report, ConsoleReporter), num_processes, folder)
    for warning in outcomes[0].warnings:
        report.warning(warning)
    result: T = outcomes[0].result
    return result


def _run_all(stage: Stage[C, T], config: C, speaks: bool, num_processes: int, folder: Path) -> list[_Outcome]:
    """The outcomes of all processes by rank; their store is in `folder`. Raises as `launch`."""
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    ends: list[Connection] = []
    relay = _Relay(processes)
    try:
        with relay:
            for rank in range(num_processes):
                receiving, sending = context.Pipe(duplex=False)
                environment = _environment(rank, num_processes, folder)
                process = context.Process(
                    target=_run, args=(sending, environment, stage, config, speaks), name=f"hyimg-{rank}"
                )
                with _interrupts_kept():
                    process.start()
                processes.append(process)
                sending.close()  # so that the end of the process is the end of the pipe
                ends.append(receiving)
                if relay.signal is not None:  # which this process has not received
                    raise relay.interruption
            return _collect(processes, ends, relay)
    finally:
        _end(processes)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A temporary folder, accessible only to this user, for the store of the processes; no port is opened.

    It is locked while in use, so that the next launch can remove the folder of a killed parent. Children must not
    remove it: if the first did so while another opens the store, torch would wait forever for the file, holding the
    interpreter's lock.
    """
    _remove_stale_folders()
    try:
        folder = tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX, ignore_cleanup_errors=True)
    except OSError as error:
        raise RunError(
            f"several processes need a temporary folder: {error.strerror or error}",
            hint="set the environment variable `TMPDIR` to a writable folder",
        ) from error
    with folder as name, open(Path(name, _LOCK_FILE), "wb") as lock:
        try_lock(lock.fileno())
        yield Path(name)


def _remove_stale_folders() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            is_new = time.time() - found.st_mtime < _SECONDS_TO_LOCK
            if (
                is_new
                or not stat.S_ISDIR(found.st_mode)
                or not hasattr(os, "geteuid")
                or found.st_uid != os.geteuid()
            ):
                continue
            with open(folder / _LOCK_FILE, "rb+") as lock:
                if try_lock(lock.fileno()):
                    shutil.rmtree(folder, ignore_errors=True)


def run_command(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs `hyimg ARGUMENTS...` in a process that imports nothing from the working folder.

    With `quiet`, its output is captured in the result. SIGTERM and SIGHUP are forwarded, and Ctrl-C reaches it through
    the terminal; it is killed if it does not end within 5 seconds.
    """
    command = [*python_command("from hyimg.cli.app import main; main()"), *arguments]
    pipe = subprocess.PIPE if quiet else None
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = process.communicate()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                process.send_signal(
                    error.exit_code - 128 if isinstance(error, Terminated) else signal.SIGTERM
                )
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _environment(rank: int, world: int, folder: Path) -> dict[str, str]:
    """The variables that torchrun sets, our store, and sockets that are limited to the loopback interface."""
    loopback = _loopback_interface()
    interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback is not None else ()
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": _HOST,
        STORE_FILE: str(folder / "store"),
        **{name: os.environ.get(name) or str(loopback) for name in interfaces},
    }


def _loopback_interface() -> str | None:
    """The network interface of 127.0.0.1; None on Windows, where torch does not take interface names."""
    if sys.platform == "win32":
        return None
    found = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == _HOST for address in addresses)
    ]
    return found[0] if found else None


class _Relay:
    """Forwards Ctrl-C, SIGTERM and SIGHUP to the processes in its block; `signal` is the first received.

    The second raises KeyboardInterrupt or Terminated. Does nothing outside the main thread, which alone receives
    signals in Python.
    """

    def __init__(self, processes: Sequence[SpawnProcess]) -> None:
        self.signal: signal.Signals | None = None
        self._last: int | None = None
        self._processes = processes
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in stop_signals()}

    def __exit__(self, *of_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated = is_repetition(self._last, number)
        self._last = number
        if self.signal is not None:
            if repeated:
                return
            raise self.interruption
        self.signal = signal.Signals(number)
        for process in self._processes:
            # without sessions (Windows), Ctrl-C has already reached them
            if process.pid is not None and process.is_alive() and _HAS_SESSIONS:
                os.kill(process.pid, number)

    @property
    def interruption(self) -> BaseException:
        if self.signal is None or self.signal == signal.SIGINT:
            return KeyboardInterrupt()
        return Terminated(self.signal)


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Blocks Ctrl-C in processes that are started in the block, until they can handle it (`_run`)."""
    if not _HAS_SESSIONS:
        yield
        return
    resource_tracker.ensure_running()  # starting it would reset the mask that the new process must inherit
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(processes: Sequence[SpawnProcess], ends: Sequence[Connection], relay: _Relay) -> list[_Outcome]:
    """Waits for the outcomes by rank. Raises the first error that another process's end did not cause."""
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
    """The error for a process that ended without an outcome."""
    processes[rank].join(_SECONDS_TO_END)
    code = processes[rank].exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    hint = "the system kills processes that use too much memory; try fewer" if code == -9 else None
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
    """Runs the stage in a child process, and sends its outcome through the pipe."""
    if _HAS_SESSIONS:
        os.setsid()  # the terminal's Ctrl-C goes to the parent, which forwards it once
    outlive_the_terminal()
    show_python_plainly()
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _terminate)
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _share_the_cores(int(environment["WORLD_SIZE"]))
    silent = SilentReporter()
    main = environment["RANK"] == "0"
    try:
        if _HAS_SESSIONS:  # delivers a Ctrl-C that arrived while this process was starting
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        result = stage(config, ConsoleReporter() if main and speaks else silent)
        outcome = _Outcome(result, silent.warnings) if main else _Outcome()
    except HyimgError as error:
        outcome = _Outcome(
            error=system_limit(error) or error, is_consequence=isinstance(error, PeerProcessLostError)
        )
    except (KeyboardInterrupt, Terminated):  # the parent raises it
        return
    except Exception:
        outcome = _Outcome(trace=traceback.format_exc())
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)  # from here on nothing needs an orderly end
    sending.send(outcome)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


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
        os.environ["OMP_NUM_THREADS"] = str(threads)  # otherwise accelerate sets it on a CPU
