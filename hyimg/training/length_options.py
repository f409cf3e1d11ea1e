"""Options that mean something only once the length of a run is known: where it begins, how often it saves."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from hyimg.config.commands import TrainConfig
from hyimg.config.load import replace
from hyimg.errors import HyimgError
from hyimg.report import count_text
from hyimg.training.steps import Schedule

if TYPE_CHECKING:
    from hyimg.training.run import Run


def with_epochs_between_saves(config: TrainConfig, schedule: Schedule) -> TrainConfig:
    """`--save_n_epoch_ratio` as the `--save_every_n_epochs` that it means, rounded down as in the reference tool."""
    ratio = config.saving.save_n_epoch_ratio
    if ratio is None:
        return config
    return replace(config, save_every_n_epochs=max(1, schedule.num_epochs // ratio), save_n_epoch_ratio=None)


def initial_step(config: TrainConfig, schedule: Schedule) -> int:
    """How many steps count as done before a fresh run's first: `--initial_step`, else by `--initial_epoch`.

    Raises HyimgError where none would be left.
    """
    duration = config.duration
    step, given = duration.initial_step, "initial_step"
    if step is None:
        step, given = ((duration.initial_epoch or 1) - 1) * schedule.steps_per_epoch, "initial_epoch"
    if step >= schedule.max_steps:
        raise HyimgError(
            f"`--{given}` {getattr(duration, given)} leaves nothing to train: the run has "
            f"{count_text(schedule.max_steps, 'step')} in {count_text(schedule.num_epochs, 'epoch')}",
            hint="raise `--max_train_steps` or `--max_train_epochs`, which count from the very beginning",
        )
    return step


def begin_at(run: Run, step: int) -> None:
    """Puts a fresh run behind that step: its epoch, and the learning rate that the schedule has by then.

    Weights and optimiser are as at the beginning; data and noise follow from the step's number by themselves.
    """
    run.step = step
    run.epoch = run.schedule.first_epoch(after_step=step, ended=step // run.schedule.steps_per_epoch) - 1
    if run.stepper.scheduler is None:
        return
    with warnings.catch_warnings():
        # that no step of the optimiser came before is just what is meant
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(step):
            run.stepper.scheduler.step()
