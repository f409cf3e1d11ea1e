"""A training run as the loop and the hooks see it: its parts and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from hyimg.config.commands import TrainConfig
from hyimg.data.training_data import BatchLoader
from hyimg.lora.network import LoRANetwork
from hyimg.memory.processes import Processes
from hyimg.plugins import Plugins
from hyimg.report import Reporter
from hyimg.training.ema import AdapterEMA
from hyimg.training.evaluation import Evaluation
from hyimg.training.exchange import Exchange
from hyimg.training.metrics import MetricsLog
from hyimg.training.nonfinite import NonFiniteGuard
from hyimg.training.objective import Objective
from hyimg.training.preservation import Preservation
from hyimg.training.resume import Resumed, Stateful
from hyimg.training.run_folder import RunFolder
from hyimg.training.step_metrics import SmoothedLosses
from hyimg.training.stepping import Stepper
from hyimg.training.steps import Schedule
from hyimg.training.uploads import Uploads


@dataclass
class Run:
    """Everything about a run in progress; hooks may read it.

    `step` and `epoch` are the last finished ones, 0 before the first; `measured` is what the
    last step gave to the metrics beside its loss. `describe(run)` gives the metadata of
    a file saved now, `identity` decides the run's numbers (`hyimg.training.identity`), `log_name` is the
    tracker's folder and `started` the time of the first start, in seconds since the epoch. Each of
    `evaluation_modes` makes a block in which the weights are those to use, where they are not those that
    the optimiser moves. Each of several processes (`processes`) has a run of its own with the same weights;
    the main one's is that which writes, and alone has `saved`, the files in the order of saving; `last_saved`, the
    newest LoRA, all have.
    """

    config: TrainConfig
    seed: int
    folder: RunFolder
    schedule: Schedule
    loader: BatchLoader
    objective: Objective
    network: LoRANetwork
    stepper: Stepper
    accelerator: Accelerator
    plugins: Plugins
    metrics: MetricsLog
    report: Reporter
    describe: Callable[[Run], Mapping[str, str]]
    save_dtype: torch.dtype
    preservation: Preservation
    guard: NonFiniteGuard
    identity: Mapping[str, Any]
    log_name: str
    started: float
    exchange: Exchange
    ema: AdapterEMA | None = None
    resumed: Resumed | None = None
    uploads: Uploads | None = None
    step: int = 0
    epoch: int = 0
    measured: dict[str, float] = field(default_factory=dict)
    losses: SmoothedLosses = field(default_factory=SmoothedLosses)
    evaluation: Evaluation = field(default_factory=Evaluation)
    parts: list[Stateful] = field(default_factory=list)
    evaluation_modes: list[Callable[[], AbstractContextManager[object]]] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)
    last_saved: Path | None = None
    saved_states: list[Path] = field(default_factory=list)

    @property
    def processes(self) -> Processes:
        return self.exchange.processes

    @property
    def optimizer(self) -> Optimizer:
        return self.stepper.optimizer

    @property
    def last_good(self) -> Path | None:
        """The last LoRA file that this run saved (of a pair the one that is not ComfyUI's), or the state that it
        goes on from."""
        if self.last_saved is not None:
            return self.last_saved
        return self.resumed.saved.path if self.resumed is not None else None

    def remember(self, part: Stateful) -> None:
        """Takes a part into the run's states; in a resumed run it is at once put where it was."""
        assert all(part.name != other.name for other in self.parts), part.name
        self.parts.append(part)
        if self.resumed is not None:
            self.resumed.restore(part)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """A block in which the network holds the weights to save, to sample and to validate with."""
        with ExitStack() as stack:
            for mode in self.evaluation_modes:
                stack.enter_context(mode())
            yield

    def save(self, *, epoch: int | None = None, step: int | None = None) -> None:
        """Saves the LoRA as it is now, under the name of an epoch, of a step, or the final one.

        Of several processes the main one does; all know the file, since any of them may have to name it.
        """
        path = self.folder.lora_path(epoch=epoch, step=step)
        if self.processes.is_main:
            self._write(path)
        self.last_saved = self.folder.forms(path)[0]

    def _write(self, path: Path) -> None:
        with self.evaluation_weights():
            files = self.folder.save(path, self.network.state(), self.describe(self), self.save_dtype)
        self.saved += files
        self.report.note("saved " + " and ".join(str(file) for file in files))
        if self.uploads is not None:
            self.uploads.send_lora(files, self.folder.directory)
