"""What is told of a step: its losses, smoothed and by noise level, and what it cost in time and memory.

Shapes: B images of a step
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyimg.report import Pace
from hyimg.training.bands import NUM_BANDS, band_name, band_of
from hyimg.training.metrics import MovingAverage

COST_FIELDS = ("seconds", "samples_per_second", "peak_memory_gb", "eta_seconds")
"""The fields of a line that tell of the machine and not of the run: two equal runs differ in these alone."""

_ALL = "all"


class SmoothedLosses:
    """The loss of each step beside its mean over the last steps, overall and by band of noise levels.

    A band's mean is over the last steps that had an image in it. Its state is part of the run's.
    """

    def __init__(self) -> None:
        self._all = MovingAverage()
        self._bands = tuple(MovingAverage() for _ in range(NUM_BANDS))

    @property
    def value(self) -> float:
        """The mean loss of the last steps; NaN before the first."""
        return self._all.value

    def add(self, loss_B: Tensor, timesteps: Sequence[float], *, taken: bool) -> dict[str, float]:
        """A step's losses (float32, on the CPU) as metrics; `timesteps` are its images', 0..1000.

        Bands without an image are left out. What was not `taken` moves no mean.
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
    """What the steps of a run cost on `device`, and how long the `num_left` that it still has will take.

    The time left counts what comes between steps too (validation, samples, saving), as often as it came so far.
    """

    def __init__(self, device: torch.device, num_left: int) -> None:
        self.device = device
        self._pace = Pace(num_left)

    def of_step(self, num_samples: int, seconds: float) -> dict[str, float]:
        """The fields of `COST_FIELDS` for a step that has just ended and took `seconds`."""
        self._pace.advance()
        values = (
            round(seconds, 6),
            round(num_samples / seconds, 3) if seconds else math.nan,
            round(peak_memory_bytes(self.device) / 1e9, 3),
            round(self._pace.seconds_left, 3),
        )
        return dict(zip(COST_FIELDS, values, strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of a CUDA device what torch had allocated, else what the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()  # of the current device, which is the run's
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes, macOS bytes


def live_text(values: Mapping[str, float], epoch: int, num_epochs: int) -> str:
    """The numbers of a step that stand beside its progress: epoch, smoothed loss, rate, gradient norm, memory."""
    parts = [f"epoch {epoch}/{num_epochs}", f"loss {values['loss_smoothed']:.4f}"]
    rate = values.get("effective_learning_rate", values.get("learning_rate"))
    if rate is not None:
        parts.append(f"lr {rate:.2e}")
    return ", ".join(
        [*parts, f"grad {values['gradient_norm']:.3g}", f"peak {values['peak_memory_gb']:.1f} GB"]
    )
