"""This process's place among the processes of a run, and small messages between them.

    processes = Processes.current()
    plan = processes.broadcast(make_plan() if processes.is_main else None)
    for item in plan[processes.rank :: processes.world]: ...
    processes.wait()

A launcher (`hyimg ... --num_processes N`, torchrun, `accelerate launch`) starts them with RANK, WORLD_SIZE and
LOCAL_RANK in their environment and runs a store that all can reach. Messages are small and rare, so the store is
enough: no process group, no device, and no timeout, since a process may be an hour behind another. If a process
dies, the launcher ends the others.

`accelerate launch` passes its flags and configuration as environment variables. Training sums the adapter's gradients
with torch.distributed and does not shard the frozen base: settings of accelerate beyond starting processes are
refused, or ignored with a warning.

Does not import torch at the top: the command line uses this before it needs torch.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hyimg.errors import HyimgError, RunError
from hyimg.report import Reporter, SilentReporter

if TYPE_CHECKING:
    from torch.distributed import Store


# Signals that ask a process to stop. SIGHUP is sent when the terminal is closed; Windows has none
STOP_SIGNALS: tuple[signal.Signals, ...] = (
    signal.SIGINT,
    signal.SIGTERM,
    *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
)
STORE_FILE = "HYIMG_STORE_FILE"
"""The environment variable with the path of the store of `--num_processes`."""

_POLL_SECONDS = 0.05
_CONNECT_SECONDS = 60.0


def stop_signals() -> tuple[signal.Signals, ...]:
    """The stop signals that this process handles: all, except a SIGHUP that `nohup` ignores."""
    return tuple(
        number
        for number in STOP_SIGNALS
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN
    )


def is_repetition(last: int | None, number: int) -> bool:
    """Whether a signal after `last` is part of the same request, and not a second one to end at once.

    When a terminal is closed, the kernel and the shell both send SIGHUP, and the session manager may send SIGTERM
    before or after.
    """
    hangup = getattr(signal, "SIGHUP", None)
    return hangup is not None and (number == hangup or (last == hangup and number == signal.SIGTERM))


class Processes:
    """The processes of a run from one's view: `rank` of `world`, `local_rank` on this machine.

    All processes must call the methods in the same order. Values are JSON.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.world = world
        self.local_rank = local_rank
        self._num_calls = 0
        self._connection: Store | None = None

    @staticmethod
    @functools.cache
    def current() -> Processes:
        """From the launcher's environment; a single process without a launcher.

        Raises HyimgError for invalid values of the launcher's variables.
        """
        rank, world, local_rank = (
            _from_environment(name, default)
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if rank >= world > 0:
            raise HyimgError(
                f"`RANK` is {rank} and `WORLD_SIZE` is {world} in the environment",
                hint="unset them, or use `--num_processes`, torchrun or `accelerate launch`, which set both",
            )
        return Processes(rank, max(1, world), local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this process plans, prints, and writes shared files."""
        return self.rank == 0

    def broadcast(self, value: object) -> Any:
        """The main process's `value`, in every process; the others' are ignored."""
        if self.world == 1:
            return value
        key = self._next_key()
        if self.is_main:
            self._store().set(key, json.dumps(value))
        return self._get(key)

    def gather(self, value: object) -> list[Any]:
        """Every process's `value`, by rank, in every process."""
        if self.world == 1:
            return [value]
        key = self._next_key()
        self._store().set(f"{key}/{self.rank}", json.dumps(value))
        return [self._get(f"{key}/{rank}") for rank in range(self.world)]

    def wait(self) -> None:
        """Returns when all processes have called it."""
        self.gather(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block in the main process first, then in the others, which find what it cached."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def tally(self) -> Tally:
        """A counter that is shared by all processes."""
        return Tally(self, self._next_key())

    @contextmanager
    def rank0_reporter(self, report: Reporter) -> Iterator[Reporter]:
        """A reporter for the block: notes and progress of other processes than rank 0 are dropped.

        Their warnings are collected, and rank 0 reports them when all have left the block.
        """
        own = SilentReporter()
        yield report if self.is_main else own
        for warnings in self.gather(own.warnings):
            for warning in warnings:
                if self.is_main:
                    report.warning(warning)

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed yet: only the first reports its error."""
        if self.world == 1:
            return True
        try:
            return bool(self._store().add("failed", 1) == 1)
        except (RuntimeError, HyimgError):  # the launcher has ended, or never existed
            return self.is_main

    def group_store(self) -> Store | None:
        """The store for torch's process group; None if torchrun's environment configures it."""
        if STORE_FILE not in os.environ:
            return None
        from torch.distributed import PrefixStore

        return PrefixStore("group", self._store())

    def _next_key(self) -> str:
        self._num_calls += 1
        return str(self._num_calls)

    def _get(self, key: str) -> Any:
        store = self._store()
        try:
            while not store.check([key]):
                time.sleep(_POLL_SECONDS)
            return json.loads(store.get(key))
        except RuntimeError as error:
            raise RunError("the launcher of this process has ended") from error

    def _store(self) -> Store:
        if self._connection is None:
            self._connection = _connect(self.world)
        return self._connection


class Tally:
    """A counter shared by several processes; `total` is its value when this process last added."""

    def __init__(self, processes: Processes, key: str) -> None:
        self.total = 0
        self._processes = processes
        self._key = key

    def add(self, count: int) -> int:
        """Adds to the counter; returns by how much all processes together raised it since this one last added."""
        if self._processes.world == 1:
            grown = count
        else:
            grown = self._processes._store().add(self._key, count) - self.total
        self.total += grown
        return grown


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise HyimgError(
            f"the environment variable `{name}` is `{value[:40]}`, not an integer as set by a launcher",
            hint=f"unset `{name}`",
        )
    return int(value)


def _connect(world: int) -> Store:
    """Connects to the launcher's store, with a prefix for this attempt.

    Our launcher uses a file that only this user can open. torchrun with `--max-restarts` restarts all processes after
    a failure, and its store still has the values of the processes before.
    """
    if (file := os.environ.get(STORE_FILE)) is not None:
        return _file_store(file)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise HyimgError(
            f"`WORLD_SIZE` is {world} in the environment, but no launcher started this process",
            hint="use `--num_processes`, torchrun or `accelerate launch`, or unset `WORLD_SIZE`",
        )
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
    )
    return PrefixStore(f"hyimg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _file_store(path: str) -> Store:
    from torch.distributed import FileStore, PrefixStore

    store = FileStore(path)
    store.set_timeout(timedelta(seconds=_CONNECT_SECONDS))
    try:
        store.add("processes", 1)
    except RuntimeError as error:
        raise RunError(
            f"the processes of this run cannot meet in `{path}`: {error}",
            hint="set the environment variable `TMPDIR` to a folder on a local disk",
        ) from error
    return PrefixStore("hyimg", store)


_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_TP": "tensor parallelism",
}
# variable -> (its default, the option that takes its place)
_WITHOUT_EFFECT = {
    "ACCELERATE_MIXED_PRECISION": ("no", "--mixed_precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--torch_compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient_accumulation_steps"),
}
# As accelerate reads them
_TRUE = ("1", "true", "yes", "y", "t", "on")


def refuse_sharding(environment: Mapping[str, str] = os.environ) -> None:
    """Raises HyimgError if accelerate is configured for DeepSpeed, FSDP or another way to shard a model."""
    for variable, name in _SHARDING.items():
        if environment.get(variable, "").lower() in _TRUE:
            raise HyimgError(
                f"accelerate is configured for {name} (`{variable}`), which is not supported: torch.distributed sums "
                "the LoRA's gradients, and the frozen base is not sharded",
                hint="start without it (`accelerate launch --multi_gpu`, torchrun, or `--num_processes N`), "
                "and use `--fp8_scaled` and `--blocks_to_swap` to fit the base into memory",
            )


@contextmanager
def without_settings(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Hides ignored settings from accelerate in the block: it fails on values that it does not know.

    Also hides the launcher's variables that are empty, which count as unset here.
    """
    names = [name for name in _WITHOUT_EFFECT if name in environment]
    names += [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if environment.get(name) == ""]
    hidden = {name: environment.pop(name) for name in names}
    try:
        yield
    finally:
        environment.update(hidden)


def warn_of_accelerate(
    report: Reporter,
    *,
    mixed_precision: str,
    torch_compile: bool,
    gradient_accumulation_steps: int,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Warns of accelerate settings that have no effect; `mixed_precision` is already resolved, not `auto`."""
    own_values = (mixed_precision, "inductor" if torch_compile else "no", str(gradient_accumulation_steps))
    for (variable, (unset, option)), own in zip(_WITHOUT_EFFECT.items(), own_values, strict=True):
        given = environment.get(variable, unset).lower()
        if given not in (unset, own.lower()):
            report.warning(
                f"accelerate's `{variable}={given}` has no effect: `{option}` of `hyimg train` applies (`{own}`)"
            )
