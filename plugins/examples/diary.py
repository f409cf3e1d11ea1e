"""A hyimg plugin in one file: sees a run's events, and leaves a diary of its best step beside the LoRA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hyimg.cache.atomic import atomic_write_text
from hyimg.hookspecs import Stateful, TrainingRun, hookimpl

if TYPE_CHECKING:
    import torch


class Diary:
    """The step with the lowest loss so far."""

    def __init__(self) -> None:
        self.best_step, self.best_loss = 0, math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]

    def write(self, run: TrainingRun, when: str) -> None:
        if not run.processes.is_main:  # of several processes one writes
            return
        text = f"{when}: best step {self.best_step} of {run.step}, loss {self.best_loss:.4f}\n"
        folder = run.folder.directory
        atomic_write_text(folder / f"{run.folder.name}.diary.txt", text, root=folder)


_diary = Diary()


@hookimpl
def hyimg_run_start(run: TrainingRun) -> None:
    """A diary of its own for each run, which a resumed run finds as it was."""
    global _diary
    _diary = Diary()
    run.register_state(Stateful("diary", _diary.state_dict, _diary.load_state_dict))


@hookimpl
def hyimg_step_end(run: TrainingRun, step: int, loss_B: torch.Tensor) -> None:
    run.measured["loss_worst"] = float(loss_B.max())
    if (loss := float(loss_B.mean())) < _diary.best_loss:
        _diary.best_step, _diary.best_loss = step, loss


@hookimpl
def hyimg_epoch_end(run: TrainingRun, epoch: int) -> None:
    _diary.write(run, f"after epoch {epoch}")


@hookimpl
def hyimg_run_end(run: TrainingRun) -> None:
    _diary.write(run, "at the end")
