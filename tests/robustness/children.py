"""Command lines in forked children, two at a time, watched: what they print, write, start, and how much they take.

A parent that has its imports done forks a child for each case, so that a case costs its own work only. The parent must
stay a single thread: run this module's users as processes of their own (`python -m tests.robustness.harness`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.robustness.rules import NOTES, Case, check_files, check_text, snapshot

MAX_CPU_SECONDS = 20
MAX_SECONDS = 240
"""A child that waits for ever; work is bounded by its processor time, which other programs cannot stretch."""
MAX_MEMORY = 800_000_000
"""Bytes that a command on files of a few kB may take beyond what the parent has loaded."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PLACES = {  # audit event -> which of its arguments are changed
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "sqlite3.connect": (0,),
}
_FOREIGN = (
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
)
_ELSEWHERE = ("/dev/null", "/dev/shm/", "/proc/self/", "/dev/tty")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAX_OUTPUT = 2_000_000


@dataclass
class Outcome:
    """How a case ended. `code` is None where the child was killed or died."""

    case: Case
    code: int | None
    seconds: float
    """Of the processor."""
    faults: list[str]
    out: str = ""
    err: str = ""
    memory: int = 0
    """Bytes beyond what the parent has."""


# ---- in the child


class Watch:
    """Notes what a process writes outside of its folder and what it starts, by Python's audit events."""

    def __init__(self, case: Case) -> None:
        self._root = os.path.realpath(case.folder)
        self._runs_code = case.runs_code
        self._has_workers = any(
            "loader_n_workers" in word.replace("-", "_").lower() for word in case.arguments
        )
        self.found: list[str] = []
        self._active = False
        sys.addaudithook(self._see)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        self._active = False  # what is done here is not the command's
        try:
            self._look(event, arguments)
        finally:
            self._active = True

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES:
                self._changes(event, path)
        elif event in _PLACES:
            for place in _PLACES[event]:
                self._changes(event, arguments[place])
        elif event in ("socket.bind", "socket.connect") and isinstance(arguments[1], (str, bytes)):
            pass  # a socket of this machine, as loader processes have it
        elif event == "pickle.find_class" and self._has_workers:
            pass  # batches come as pickles of torch's from processes of the command's own
        elif event in _FOREIGN and not self._runs_code:
            self.found.append(f"{event} {str(arguments)[:200]}")
        elif event == "exec" and not self._runs_code:
            file = getattr(arguments[0], "co_filename", "")
            if isinstance(file, str) and file.startswith(self._root):
                self.found.append(f"runs the code of {file}")

    def _changes(self, event: str, path: object) -> None:
        if not isinstance(path, (str, bytes)):
            return
        name = os.fsdecode(path)
        if name == ":memory:" or name.startswith("file::memory:") or "\0" in name:
            return
        # the name itself is changed by a rename, what it leads to by a write
        head, tail = os.path.split(os.path.abspath(name))
        place = os.path.realpath(name) if event == "open" else os.path.join(os.path.realpath(head), tail)
        if not (place + "/").startswith(self._root + "/") and not place.startswith(_ELSEWHERE):
            self.found.append(f"{event} of {place}, outside of the case's folder")


def run_command(case: Case, watch: Watch, limits: Mapping[int, tuple[int, int]]) -> int:
    """Runs the command line as `hyimg` does, to the end of the process but for its exit; gives the exit code.

    A signal comes when the handlers are in place: before, it ends any process. One that comes late is blocked.

    `limits` are set when the command is done: what libraries do at the exit of a process is not the command's.
    """
    from hyimg.cli import app
    from hyimg.distributed.processes import Processes

    run = app.run

    def run_and_be_signalled(arguments: list[str]) -> int:
        if case.signal is not None:
            _send_later(*case.signal)
        try:
            return run(arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    app.run = run_and_be_signalled

    Processes.current.cache_clear()  # of the parent's environment
    code: Any = 0
    with watch.watching():
        try:
            app.main(case.arguments)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 70
        for limit, values in limits.items():
            resource.setrlimit(limit, values)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return code if isinstance(code, int) else int(code is not None)


def _address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def mount(target: Path | str, options: str, flags: int = 0) -> bool:
    """Whether a disk in memory could be mounted; only root can."""
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.mount(b"none", os.fsencode(target), b"tmpfs", flags, options.encode())) == 0


def mount_privately(target: str, num_bytes: int) -> bool:
    """Mounts a disk of that size that this process and its children see, and nobody else."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private_and_all_below = 0x20000, 0x40000 | 0x4000
    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private_and_all_below, None):
        return False
    return mount(target, f"size={num_bytes}")


def _send_later(number: int, seconds: float) -> None:
    """Forks a process that sends this one a signal: a thread of this one would change when it is handled."""
    command = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == command:
            os.kill(command, number)
        os._exit(0)


def _in_child(case: Case, prepare: Callable[[Case], None], outputs: Sequence[int]) -> None:
    """Prepares the files, runs the command, looks at the files again, and leaves `result.json`. Never returns.

    `outputs` are the pipes for stdout and stderr: a limit on files' sizes must not cut what is printed.
    """
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for name in ("work", "home", "tmp"):
            (case.folder / name).mkdir(exist_ok=True)
        prepare(case)
        os.chdir(case.work)
        home = str(case.folder / "home")
        os.environ.update({"HOME": home, "XDG_CACHE_HOME": home, "TMPDIR": str(case.folder / "tmp")})
        os.environ.update(case.environment)
        import tempfile

        tempfile.tempdir = None
        before = snapshot(case.folder)
        known = {"words": case.words, "arguments": case.arguments, "is_json": case.is_json}
        (case.folder / "case.json").write_text(json.dumps(known), encoding="utf-8")
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (outputs[0], 1), (outputs[1], 2)):
            os.dup2(source, target)
            os.close(source)
        # those of the parent may stand on files, which can be sought
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        usage = resource.getrusage(resource.RUSAGE_SELF)
        watch = Watch(case)
        hard = {limit: resource.getrlimit(limit) for limit in case.limits}
        for limit, value in case.limits.items():
            value += _address_space() if limit == resource.RLIMIT_AS else 0
            resource.setrlimit(limit, (value, hard[limit][1]))
        if case.shared_memory is not None:
            mount_privately("/dev/shm", case.shared_memory)
        code = run_command(case, watch, hard)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usage.ru_maxrss)
        faults = [*watch.found[:5], *check_files(case, code, before)]
        if grown > MAX_MEMORY:
            faults.append(f"takes {grown / 1e6:.0f} MB")
        result = {"code": code, "faults": faults, "memory": grown}
        (case.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        os._exit(0)
    except BaseException:
        (case.folder / "broken.txt").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(3)


# ---- in the parent


@dataclass
class _Running:
    """A child, what it has printed so far, and since when it runs."""

    case: Case
    pipes: dict[int, bytearray]
    started: float

    def read(self) -> None:
        for descriptor, text in self.pipes.items():
            with contextlib.suppress(BlockingIOError):
                while data := os.read(descriptor, 65536):
                    text += data[: max(0, _MAX_OUTPUT - len(text))]


def run_cases(cases: Sequence[tuple[Case, Callable[[Case], None]]], *, jobs: int) -> Iterator[Outcome]:
    """Runs every case in a child of its own, `jobs` at a time; outcomes come as they end."""
    waiting = list(reversed(cases))
    running: dict[int, _Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            pid, child = _start(*waiting.pop())
            running[pid] = child
        for child in running.values():
            child.read()
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            for number, child in running.items():
                if time.monotonic() - child.started > MAX_SECONDS:
                    os.killpg(number, signal.SIGKILL)
            time.sleep(0.002)
        elif pid in running:
            child = running.pop(pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it started
            child.read()
            for descriptor in child.pipes:
                os.close(descriptor)
            yield _outcome(child, status, usage.ru_utime + usage.ru_stime)


def _start(case: Case, prepare: Callable[[Case], None]) -> tuple[int, _Running]:
    case.folder.mkdir(parents=True, exist_ok=True)
    for name in NOTES:
        (case.folder / name).unlink(missing_ok=True)
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        os.setpgid(0, 0)
        for descriptor in (out, err):
            os.close(descriptor)
        limits = {resource.RLIMIT_CPU: MAX_CPU_SECONDS, resource.RLIMIT_CORE: 0}
        limits[resource.RLIMIT_AS] = (
            _address_space() + 4 * MAX_MEMORY
        )  # a fault is not to take the machine with it
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        _in_child(case, prepare, (to_out, to_err))
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    for descriptor in (to_out, to_err):
        os.close(descriptor)
    for descriptor in (out, err):
        os.set_blocking(descriptor, False)
    return pid, _Running(case, {out: bytearray(), err: bytearray()}, time.monotonic())


def _outcome(child: _Running, status: int, cpu_seconds: float) -> Outcome:
    case, seconds = child.case, time.monotonic() - child.started
    out, err = map(bytes, child.pipes.values())
    texts = (out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
    if (case.folder / "broken.txt").exists():
        raise RuntimeError(f"the harness failed in {case.name}: {(case.folder / 'broken.txt').read_text()}")
    described = case.folder / "case.json"
    if described.exists():
        known = json.loads(described.read_text(encoding="utf-8"))
        case.words, case.arguments, case.is_json = known["words"], known["arguments"], known["is_json"]
    result_path = case.folder / "result.json"
    if result_path.exists():
        result = json.loads(result_path.read_text(encoding="utf-8"))
        faults = [*result["faults"], *check_text(case, result["code"], out, err)]
        return Outcome(case, result["code"], cpu_seconds, faults, *texts, memory=result["memory"])
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    why = f"ends with status {status}" if number is None else f"is ended by {signal.Signals(number).name}"
    if number == signal.SIGXCPU:
        why = f"takes more than {MAX_CPU_SECONDS} s of a processor"
    elif number == signal.SIGKILL:
        why = f"takes more than {MAX_SECONDS} s, or is killed"
    faults = [] if case.may_lack_memory else [f"{why} after {seconds:.0f} s"]
    return Outcome(case, None, cpu_seconds, faults, *texts)
