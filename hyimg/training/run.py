"""A training run in progress: its parts, and how far it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from hyimg.config.commands import TrainConfig
from hyimg.data.batches import BatchLoader
from hyimg.distributed.processes import Processes
from hyimg.hookspecs import Stateful
from hyimg.lora.network import AdapterNetwork
from hyimg.plugins import Plugins
from hyimg.report import Reporter
from hyimg.training.ema import AdapterEMA
from hyimg.training.hub import Uploads
from hyimg.training.metadata import training_metadata
from hyimg.training.metrics import MetricsLog, SmoothedLosses
from hyimg.training.objective import Objective, OutputPreservation
from hyimg.training.preparation import Preparation
from hyimg.training.resume import Resumed
from hyimg.training.run_folder import RunFolder
from hyimg.training.stepping import NonFiniteGuard, Stepper
from hyimg.training.steps import Schedule

_SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Run:
    """A run in progress; plugins see it as `hyimg.hookspecs.TrainingRun`.

    `step` and `epoch` are the last completed ones, 0 before the first; `measured` holds the last step's metrics
    other than losses and rates, `validation_seed` the seed of the last validation. `fingerprint` is what determines
    the run's numbers (`hyimg.training.fingerprint`), `metadata` the part of the saved files' metadata that does not
    change, `log_name` the trackers' folder, `started` the time of the first start in seconds since the epoch. Each
    of `evaluation_modes` opens a block in which the weights are those to use, where these differ from those that the
    optimiser moves.

    Each of several processes has its own run, with the same weights. The main process writes, and only it has
    `saved`, the files in the order of saving; all know `last_saved`, the newest LoRA.
    """

    prepared: Preparation
    report: Reporter
    schedule: Schedule
    loader: BatchLoader
    objective: Objective
    network: AdapterNetwork
    stepper: Stepper
    accelerator: Accelerator
    metrics: MetricsLog
    preservation: OutputPreservation
    guard: NonFiniteGuard
    fingerprint: Mapping[str, Any]
    metadata: Mapping[str, str]
    log_name: str
    started: float
    ema: AdapterEMA | None = None
    step: int = 0
    epoch: int = 0
    validation_seed: int | None = None
    measured: dict[str, float] = field(default_factory=dict)
    losses: SmoothedLosses = field(default_factory=SmoothedLosses)
    parts: list[Stateful] = field(default_factory=list)
    evaluation_modes: list[Callable[[], AbstractContextManager[object]]] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)
    last_saved: Path | None = None
    saved_states: list[Path] = field(default_factory=list)

    @property
    def config(self) -> TrainConfig:
        return self.prepared.config

    @property
    def seed(self) -> int:
        return self.prepared.seed

    @property
    def device(self) -> torch.device:
        return self.prepared.device

    @property
    def folder(self) -> RunFolder:
        return self.prepared.folder

    @property
    def plugins(self) -> Plugins:
        return self.prepared.plugins

    @property
    def processes(self) -> Processes:
        return self.prepared.processes

    @property
    def resumed(self) -> Resumed | None:
        return self.prepared.resumed

    @property
    def uploads(self) -> Uploads | None:
        return self.prepared.uploads

    @property
    def optimizer(self) -> Optimizer:
        return self.stepper.optimizer

    @property
    def save_dtype(self) -> torch.dtype:
        """`--save_precision`."""
        return _SAVE_DTYPES[self.config.saving.save_precision]

    @property
    def last_good(self) -> Path | None:
        """The newest LoRA file that this run saved (not ComfyUI's, if there are both), else the state that it resumed
        from."""
        if self.last_saved is not None:
            return self.last_saved
        return self.resumed.saved.path if self.resumed is not None else None

    def register_state(self, part: Stateful) -> None:
        """Adds a part to the run's states; in a resumed run it is restored at once."""
        assert all(part.name != other.name for other in self.parts), part.name
        self.parts.append(part)
        if self.resumed is not None:
            self.resumed.restore(part)

    remember = register_state  # its earlier name, which plugins may still call

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """A block in which the network holds the weights to save, to validate and to render samples with."""
        with ExitStack() as stack:
            for mode in self.evaluation_modes:
                stack.enter_context(mode())
            yield

    def save(self, *, epoch: int | None = None, step: int | None = None) -> None:
        """Saves the LoRA under the name of an epoch or a step, or the final name.

        Only the main process writes; all processes know the file, since each may have to name it in an error.
        """
        path = self.folder.lora_path(epoch=epoch, step=step)
        if self.processes.is_main:
            metadata = training_metadata(
                self.metadata,
                seed=self.seed,
                started=self.started,
                optimizer=self.optimizer,
                optimizer_args=self.config.optimizer.optimizer_args,
                schedule=self.schedule,
                step=self.step,
                epoch=self.epoch,
            )
            with self.evaluation_weights():
                files = self.folder.save(path, self.network.state(), metadata, self.save_dtype)
            self.saved += files
            self.report.note("saved " + " and ".join(str(file) for file in files))
            if self.uploads is not None:
                self.uploads.send_lora(files, self.folder.directory)
        self.last_saved = self.folder.forms(path)[0]

    def skip_to(self, step: int) -> None:
        """Starts a fresh run after that step: in its epoch, at the learning rate that the LR scheduler has by then.

        Weights and optimiser are fresh; data and noise follow from the step's number.
        """
        self.step = step
        self.epoch = (
            self.schedule.first_epoch(after_step=step, ended=step // self.schedule.steps_per_epoch) - 1
        )
        if self.stepper.scheduler is None:
            return
        with warnings.catch_warnings():
            # about LR scheduler steps without optimiser steps, which are intended here
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(step):
                self.stepper.scheduler.step()
