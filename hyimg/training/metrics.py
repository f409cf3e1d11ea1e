"""Metrics of a step: losses, smoothed and by noise level, time and memory; `NAME.metrics.jsonl`, a JSON line per step.

Losses are also reported by band of noise levels, since they depend strongly on the noise level.

Shapes: B images of a step
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from hyimg.cache.atomic import atomic_path, atomic_write_text, explain_write
from hyimg.cache.own_files import is_link, open_to_append
from hyimg.memory.device import peak_memory

_CHUNK_BYTES = 1 << 20
# A line begins with its step; at most 15 digits are read
_STEP = re.compile(rb'\{"step": (\d{1,15})[,}]')


class LogPosition(NamedTuple):
    """The part of a log that a state covers: the first `num_bytes` bytes of the file `name`, with their SHA-256."""

    name: str
    num_bytes: int
    sha256: str


class MetricsLog:
    """Appends a line per step, written at once and flushed, so that a killed run leaves complete lines.

    Writes inside a `with` block. `prepare` is called first and keeps the lines of the steps before a resumed run
    (`cut_log`); without it the file starts empty. With `writes` False nothing is written: only the main process of a
    run keeps metrics.
    """

    def __init__(
        self, path: Path, prepare: Callable[[Path], object] | None = None, *, writes: bool = True
    ) -> None:
        self.path = path
        self._prepare = prepare
        self._writes = writes

    @property
    def position(self) -> LogPosition:
        """The position after the last line, which is on disk by then. The cost does not depend on the log's length.

        Raises WriteError if the log cannot be flushed.
        """
        with _explained(self.path):
            os.fsync(self._file.fileno())
        return LogPosition(self.path.name, self._num_bytes, self._digest.hexdigest())

    def write(self, values: Mapping[str, float | int | str | Mapping[str, float] | None]) -> None:
        """Writes a line. Values that are not finite become null, which JSON has no other form for.

        Raises WriteError if it cannot be written.
        """
        if not self._writes:
            return
        line = (json.dumps({k: _finite(v) for k, v in values.items()}) + "\n").encode()
        with _explained(self.path):
            self._file.write(line)
            self._file.flush()
        self._digest.update(line)
        self._num_bytes += len(line)

    def __enter__(self) -> MetricsLog:
        if self._writes:
            if self._prepare is None:
                atomic_write_text(self.path, "", root=self.path.parent)
            else:
                self._prepare(self.path)
            with _explained(self.path):
                self._num_bytes, self._digest = _digest(self.path)
                self._file = open_to_append(self.path, root=self.path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            with _explained(self.path):
                self._file.close()


def cut_log(path: Path, position: LogPosition, *, step: int, folder: Path) -> str | None:
    """Truncates or copies the log so that `path` ends where the state of `step` was saved; returns a warning if not.

    The lines are searched in `path`, then next to the state, in `folder`. If neither file starts with the log's bytes,
    the lines of `path` up to that step are kept unchanged.

    Raises WriteError or HyimgError if the log cannot be written.
    """
    if not position.num_bytes:
        atomic_write_text(path, "", root=path.parent)
        return None
    if not is_link(path) and _begins_as(path, position):
        _truncate(path, position.num_bytes)
        return None
    for source in (path.with_name(position.name), folder / position.name):
        if _begins_as(source, position):
            _copy(source, path, position.num_bytes)
            return None
    if is_link(path) or not path.is_file():
        atomic_write_text(path, "", root=path.parent)
        return f"`{position.name}` up to step {step} was not found; the log starts at step {step + 1}"
    with _explained(path):
        _truncate(path, _bytes_up_to(path, step))
    return (
        f"`{path.name}` was changed after the state was saved: its lines up to step {step} are kept unchanged"
    )


def _digest(path: Path, num_bytes: int | None = None) -> tuple[int, hashlib._Hash]:
    """Size and SHA-256 of a file's beginning, or of all of it."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES if num_bytes is None else min(_CHUNK_BYTES, num_bytes - count)):
            digest.update(chunk)
            count += len(chunk)
    return count, digest


def _begins_as(path: Path, position: LogPosition) -> bool:
    try:
        if not path.is_file() or path.stat().st_size < position.num_bytes:
            return False
        return _digest(path, position.num_bytes)[1].hexdigest() == position.sha256
    except OSError:
        return False


def _truncate(path: Path, num_bytes: int) -> None:
    with _explained(path), path.open("r+b") as file:
        file.truncate(num_bytes)
        os.fsync(file.fileno())


def _copy(source: Path, path: Path, num_bytes: int) -> None:
    with (
        atomic_path(path, root=path.parent) as temporary,
        source.open("rb") as before,
        temporary.open("wb") as after,
    ):
        while num_bytes and (chunk := before.read(min(_CHUNK_BYTES, num_bytes))):
            after.write(chunk)
            num_bytes -= len(chunk)


def _bytes_up_to(path: Path, step: int) -> int:
    """The offset of the first line of a later step, or of the first line that is not a complete one."""
    num_bytes = 0
    with path.open("rb") as file:
        while line := file.readline(_CHUNK_BYTES):
            found = _STEP.match(line)
            if found is None or int(found[1]) > step or not line.endswith(b"\n"):
                break
            num_bytes += len(line)
    return num_bytes


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain_write(error, path, path) from error


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MovingAverage:
    """The mean of the last `window` values."""

    def __init__(self, window: int = 50) -> None:
        self.window = window
        self._values: list[float] = []

    def add(self, value: float) -> float:
        """Adds a value and returns the mean."""
        self._values = [*self._values[-self.window + 1 :], value]
        return self.value

    @property
    def value(self) -> float:
        """The mean now; NaN before the first value."""
        return sum(self._values) / len(self._values) if self._values else math.nan

    def state_dict(self) -> list[float]:
        return list(self._values)

    def load_state_dict(self, values: list[float]) -> None:
        self._values = list(values)


NUM_BANDS = 4
BANDS = tuple((1000 * i / NUM_BANDS, 1000 * (i + 1) / NUM_BANDS) for i in range(NUM_BANDS))
"""Lower and upper timestep of each band, 0..1000."""


def band_of(timestep: float) -> int:
    """The index of the band of a timestep (0..1000)."""
    return min(int(timestep * NUM_BANDS / 1000), NUM_BANDS - 1)


def band_name(band: int) -> str:
    """Its name in metrics, such as `t0-250`."""
    low, high = BANDS[band]
    return f"t{low:g}-{high:g}"


COST_FIELDS = ("seconds", "samples_per_second", "peak_memory_gb", "eta_seconds")
"""The fields that depend on the machine: two equal runs differ in these alone."""

_ALL = "all"


class SmoothedLosses:
    """The loss of each step and its moving average, overall and by band of noise levels.

    A band's average is over the last steps with an image in it. The averages are part of the run's state.
    """

    def __init__(self) -> None:
        self._all = MovingAverage()
        self._bands = tuple(MovingAverage() for _ in range(NUM_BANDS))

    @property
    def value(self) -> float:
        """The mean loss of the last 50 steps; NaN before the first."""
        return self._all.value

    def add(self, loss_B: Tensor, timesteps: Sequence[float], *, taken: bool) -> dict[str, float]:
        """A step's losses (float32, on the CPU) as metrics; `timesteps` are its images', 0..1000.

        Bands without an image are omitted. A step that was not `taken` changes no average.
        """
        loss = float(loss_B.mean())
        if taken:
            self._all.add(loss)
        values = {"loss": loss, "loss_smoothed": self._all.value}
        bands = [band_of(timestep) for timestep in timesteps]
        for band in sorted(set(bands)):
            of_band = loss_B[torch.tensor([own == band for own in bands])]
            loss = float(of_band.mean())
            if taken:
                self._bands[band].add(loss)
            values[f"loss_{band_name(band)}"] = loss
            values[f"loss_smoothed_{band_name(band)}"] = self._bands[band].value
        return values

    def state_dict(self) -> dict[str, list[float]]:
        return {name: average.state_dict() for name, average in self._named()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        for name, average in self._named():
            average.load_state_dict(state[name])

    def _named(self) -> list[tuple[str, MovingAverage]]:
        return [(_ALL, self._all), *((band_name(band), mean) for band, mean in enumerate(self._bands))]


class StepCost:
    """The cost of steps on `device`, and the estimated time of the `num_left` remaining ones.

    The estimate includes validation, samples and saving between steps at their rate so far.
    """

    def __init__(self, device: torch.device, num_left: int) -> None:
        self.device = device
        self._left = num_left
        self._since, self._count, self._is_first = time.monotonic(), 0, True

    def of_step(self, num_samples: int, seconds: float) -> dict[str, float]:
        """The `COST_FIELDS` of a step that has just ended after `seconds`."""
        now = time.monotonic()
        self._left -= 1
        self._count += 1
        left = max(self._left, 0) * (now - self._since) / self._count
        if self._is_first:  # which may include compiling: it counts only until there is a second
            self._since, self._count, self._is_first = now, 0, False
        values = (
            round(seconds, 6),
            round(num_samples / seconds, 3) if seconds else math.nan,
            round(peak_memory_bytes(self.device) / 1e9, 3),
            round(left, 3),
        )
        return dict(zip(COST_FIELDS, values, strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: that which torch allocated on a GPU if it counts that, else that of the process."""
    on_device = peak_memory(device)
    if on_device is not None:
        return on_device
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes, macOS bytes


def live_text(values: Mapping[str, float], epoch: int, num_epochs: int) -> str:
    """The text next to the progress bar: epoch, smoothed loss, learning rate, gradient norm, memory."""
    parts = [f"epoch {epoch}/{num_epochs}", f"loss {values['loss_smoothed']:.4f}"]
    rate = values.get("effective_learning_rate", values.get("learning_rate"))
    if rate is not None:
        parts.append(f"lr {rate:.2e}")
    return ", ".join(
        [*parts, f"grad {values['gradient_norm']:.3g}", f"peak {values['peak_memory_gb']:.1f} GB"]
    )
