"""Several processes on one piece of work: which of them this one is, and how they tell each other things.

    processes = Processes.current()
    plan = processes.broadcast(make_plan() if processes.is_main else None)
    for item in plan[processes.rank :: processes.world]: ...
    processes.wait()

A launcher (`hyimg ... --num_processes N`, torchrun, `accelerate launch`) starts them with RANK, WORLD_SIZE
and LOCAL_RANK in their environment and keeps a store that all can reach. What is told are small things at
long intervals, so the store is all that is needed: no process group, no device, and no timeout, since one
process may rightly be an hour behind another. A process that dies ends all: that is the launcher's part.

No torch at the top: the command line asks who speaks before it needs any.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hyimg.errors import HyimgError, RunError
from hyimg.report import Reporter, SilentReporter

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_SECONDS = 0.05
_CONNECT_SECONDS = 60.0


class Processes:
    """The processes of a run as one of them sees it: `rank` of `world`, `local_rank` on this machine.

    The methods are for all of them to call, in the same order. Values are plain JSON.
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
        """As the launcher's environment says; one process alone where there is none."""
        rank, world, local_rank = (
            int(os.environ.get(name) or default)
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        return Processes(rank, world, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that plans, prints and writes what is written once."""
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
        """Returns when all have come here."""
        self.gather(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block first, the others after it (and find what it has cached)."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def tally(self) -> Tally:
        """A count that all add to."""
        return Tally(self, self._next_key())

    @contextmanager
    def one_voice(self, report: Reporter) -> Iterator[Reporter]:
        """Where to report in the block: notes and progress are the main process's, warnings are collected.

        What the others warn of, the main process tells when all are through the block.
        """
        own = SilentReporter()
        yield report if self.is_main else own
        for warnings in self.gather(own.warnings):
            for warning in warnings:
                if self.is_main:
                    report.warning(warning)

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed before: the first one says why, and the others are silent."""
        if self.world == 1:
            return True
        try:
            return bool(self._store().add("failed", 1) == 1)
        except (RuntimeError, HyimgError):  # the launcher is gone, or there is none
            return self.is_main

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
            raise RunError("the launcher of this process is gone") from error

    def _store(self) -> Store:
        if self._connection is None:
            self._connection = _connect(self.world)
        return self._connection


class Tally:
    """A count that several processes add to; `total` is what this process knows of it."""

    def __init__(self, processes: Processes, key: str) -> None:
        self.total = 0
        self._processes = processes
        self._key = key

    def add(self, count: int) -> int:
        """Adds to the count. Returns by how much it has grown, by anybody, since this process last added."""
        if self._processes.world == 1:
            grown = count
        else:
            grown = self._processes._store().add(self._key, count) - self.total
        self.total += grown
        return grown


def _connect(world: int) -> Store:
    """The store that the launcher keeps, and in it the part of this attempt.

    torchrun with `--max-restarts` starts all processes anew after a failure and keeps its store, where what the
    processes before them have told still stands.
    """
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
