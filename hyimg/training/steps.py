"""The length of a run: how its epochs' batches become optimiser steps, where it starts, and how often it saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hyimg.config.run_options import Duration, Saving
from hyimg.data.samples import Batch
from hyimg.errors import HyimgError
from hyimg.report import count_text

DEFAULT_STEPS = 1600
"""The length of a run without `--max_train_steps` and `--max_train_epochs`, as in the reference tool."""


@dataclass(frozen=True)
class Step:
    """One optimiser step. `number` counts from 1 over the whole run; its batches are consecutive."""

    number: int
    batches: Sequence[Batch]

    @property
    def num_images(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def share(self, rank: int, world: int) -> range:
        """The indices of the batches that process `rank` of `world` computes; possibly none at an epoch's end."""
        return range(rank, len(self.batches), world)

    def images(self, index: int) -> slice:
        """The positions of a batch's images among all images of the step."""
        start = sum(len(batch) for batch in self.batches[:index])
        return slice(start, start + len(self.batches[index]))


@dataclass(frozen=True)
class Epoch:
    """An epoch, counted from 1, with its remaining steps. `complete` is False if the run ends before the epoch."""

    number: int
    steps: Sequence[Step]
    complete: bool


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    A step takes `accumulation` consecutive batches of one epoch, over all processes; the rest at an epoch's end is a
    smaller step, so that no image is dropped. `epoch_batches(epoch)` gives an epoch's batches in order, the same
    number in every epoch.
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
        """The schedule of a run; epochs take precedence over steps, and the default is 1600 steps."""
        batches = len(epoch_batches(1))
        assert batches > 0, "an empty dataset is an error earlier"
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

    def first_epoch(self, *, after_step: int, ended: int) -> int:
        """The epoch in which a run continues after that step.

        `ended` counts the epochs that were completed, files included. An epoch ends after its last step, so a run
        may have stopped between the two: then it continues in that epoch, with no step left in it.
        """
        done, into_the_next = divmod(after_step, self.steps_per_epoch)
        return done if done and into_the_next == 0 and ended == done - 1 else done + 1

    def batches_done(self, *, after_step: int, ended: int) -> int:
        """How many batches of the epoch in which a run continues (`first_epoch`) are done."""
        before = (self.first_epoch(after_step=after_step, ended=ended) - 1) * self.steps_per_epoch
        return min((after_step - before) * self.accumulation, self.batches_per_epoch)

    def epochs(self, *, after_step: int = 0, ended: int = 0) -> Iterator[Epoch]:
        """The epochs of the run from there on (`first_epoch`), in order, with their remaining steps."""
        for number in range(self.first_epoch(after_step=after_step, ended=ended), self.num_epochs + 1):
            batches = self.epoch_batches(number)
            before = (number - 1) * self.steps_per_epoch
            steps = [
                Step(before + index + 1, batches[index * self.accumulation : (index + 1) * self.accumulation])
                for index in range(min(self.steps_per_epoch, self.max_steps - before))
            ]
            left = [step for step in steps if step.number > after_step]
            yield Epoch(number, left, complete=len(steps) == self.steps_per_epoch)


def epochs_between_saves(saving: Saving, schedule: Schedule) -> int | None:
    """`--save_every_n_epochs`, or its value according to `--save_n_epoch_ratio`, rounded down as in the reference
    tool."""
    ratio = saving.save_n_epoch_ratio
    return saving.save_every_n_epochs if ratio is None else max(1, schedule.num_epochs // ratio)


def initial_step(duration: Duration, schedule: Schedule) -> int:
    """The number of steps that a fresh run skips: `--initial_step`, else those before `--initial_epoch`.

    Raises HyimgError if no step would be left.
    """
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
