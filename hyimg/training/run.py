"""A training run as the loop and the hooks see it: its parts, its length, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from hyimg.config.commands import TrainConfig
from hyimg.data.batches import Batch
from hyimg.data.training_data import BatchLoader
from hyimg.lora.network import LoRANetwork
from hyimg.plugins import Plugins
from hyimg.report import Reporter
from hyimg.training.ema import AdapterEMA
from hyimg.training.metrics import MetricsLog
from hyimg.training.objective import Objective
from hyimg.training.preservation import Preservation
from hyimg.training.run_folder import RunFolder

DEFAULT_STEPS = 1600
"""The length of a run that was given neither steps nor epochs, as in the reference tool."""


@dataclass(frozen=True)
class Step:
    """One optimiser step. `number` counts from 1 over the whole run; its batches are consecutive."""

    number: int
    batches: Sequence[Batch]

    @property
    def num_samples(self) -> int:
        return sum(len(batch) for batch in self.batches)


@dataclass(frozen=True)
class Epoch:
    """An epoch, counted from 1, or what of it the run still reaches: then it is not `complete`."""

    number: int
    steps: Sequence[Step]
    complete: bool

    @property
    def batches(self) -> list[Batch]:
        return [batch for step in self.steps for batch in step.batches]


@dataclass(frozen=True)
class Schedule:
    """How the epochs' batches become steps.

    A step takes `accumulation` consecutive batches of one epoch; what is left at an epoch's end makes a
    smaller step, so that no image is dropped. `epoch_batches(epoch)` gives an epoch's batches in order, as
    many in every epoch.
    """

    epoch_batches: Callable[[int], Sequence[Batch]]
    batches_per_epoch: int
    accumulation: int
    max_steps: int

    @classmethod
    def plan(
        cls,
        epoch_batches: Callable[[int], Sequence[Batch]],
        *,
        accumulation: int,
        max_train_steps: int | None,
        max_train_epochs: int | None,
    ) -> Schedule:
        """The schedule of a run; epochs win over steps, and neither means 1600 steps."""
        batches = len(epoch_batches(1))
        assert batches > 0, "an empty dataset is found before"
        steps = max_train_steps or DEFAULT_STEPS
        if max_train_epochs is not None:
            steps = max_train_epochs * math.ceil(batches / accumulation)
        return cls(epoch_batches, batches, accumulation, steps)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.max_steps / self.steps_per_epoch)

    def epochs(self) -> Iterator[Epoch]:
        """The epochs of the run, in order."""
        for number in range(1, self.num_epochs + 1):
            batches = self.epoch_batches(number)
            before = (number - 1) * self.steps_per_epoch
            steps = [
                Step(before + index + 1, batches[index * self.accumulation : (index + 1) * self.accumulation])
                for index in range(min(self.steps_per_epoch, self.max_steps - before))
            ]
            yield Epoch(number, steps, complete=len(steps) == self.steps_per_epoch)


@dataclass
class Run:
    """Everything about a run in progress; hooks may read it.

    `step` and `epoch` are the last finished ones, 0 before the first; `measured` is what the last step gave to
    the metrics beside its loss. `describe(run)` gives the metadata of
    a file saved now.
    """

    config: TrainConfig
    seed: int
    folder: RunFolder
    schedule: Schedule
    loader: BatchLoader
    objective: Objective
    network: LoRANetwork
    optimizer: Optimizer
    accelerator: Accelerator
    plugins: Plugins
    metrics: MetricsLog
    report: Reporter
    describe: Callable[[Run], Mapping[str, str]]
    save_dtype: torch.dtype
    preservation: Preservation
    ema: AdapterEMA | None = None
    step: int = 0
    epoch: int = 0
    measured: dict[str, float] = field(default_factory=dict)
    saved: list[Path] = field(default_factory=list)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimiser moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, *, epoch: int | None = None, step: int | None = None) -> None:
        """Saves the LoRA as it is now, under the name of an epoch, of a step, or the final one."""
        path = self.folder.lora_path(epoch=epoch, step=step)
        with self.ema.swapped_in() if self.ema is not None else nullcontext():
            files = self.folder.save(path, self.network.state(), self.describe(self), self.save_dtype)
        self.saved += files
        self.report.note("saved " + " and ".join(str(file) for file in files))
