"""The most memory that a piece of code had at a time: of the process on a CPU, of the allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.003


class ProcessPeaks:
    """The largest growth of this process's own and mapped memory in a block, looked at every few ms (Linux).

    `own` is memory that the system cannot take back (of no file), in bytes; `mapped` are pages of files, which
    count as used and are given back whenever they are wanted. `own_left` is what of `own` is there at the end.
    """

    def __enter__(self) -> ProcessPeaks:
        _give_back()
        self.own = self.mapped = self.own_left = 0
        self._first = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._stop.set()
        self._thread.join()
        self.own_left = self._now()[0] - self._first[0]

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        own, mapped = self._now()
        self.own = max(self.own, own - self._first[0])
        self.mapped = max(self.mapped, mapped - self._first[1])

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        # Pages that are shared with nobody, but could be, count as shared memory
        return 1024 * (kilobytes["RssAnon"] + kilobytes["RssShmem"]), 1024 * kilobytes["RssFile"]


def _give_back() -> None:
    """Gives freed memory back to the system: what the allocator keeps would be used again without being seen."""
    gc.collect()
    with suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


class DevicePeak:
    """The most bytes that a device held in a block: the whole allocator's on CUDA, the process's growth on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.num_bytes = 0
        self._process = ProcessPeaks()

    def __enter__(self) -> DevicePeak:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._process.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
            self.num_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._process.__exit__()
            self.num_bytes = self._process.own
