"""How long a run is, and which batches make each of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hyimg.data.batches import Batch

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

    def share(self, rank: int, world: int) -> range:
        """Which of the batches the process `rank` of `world` takes; at an epoch's end it may be none."""
        return range(rank, len(self.batches), world)

    def places(self, number: int) -> range:
        """Where the images of a batch stand among all of the step."""
        before = sum(len(batch) for batch in self.batches[:number])
        return range(before, before + len(self.batches[number]))


@dataclass(frozen=True)
class Epoch:
    """An epoch, counted from 1, with the steps to do. One whose end the run does not reach is not `complete`."""

    number: int
    steps: Sequence[Step]
    complete: bool

    def share(self, rank: int, world: int) -> list[Batch]:
        """The batches that the process `rank` of `world` takes, in order."""
        return [step.batches[number] for step in self.steps for number in step.share(rank, world)]


@dataclass(frozen=True)
class Schedule:
    """How the epochs' batches become steps.

    A step takes `accumulation` consecutive batches of one epoch, over all processes; what is left at an
    epoch's end makes a smaller step, so that no image is dropped. `epoch_batches(epoch)` gives an epoch's
    batches in order, as many in every epoch.
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

    def first_epoch(self, *, after_step: int, ended: int) -> int:
        """The epoch in which a run goes on after that step.

        `ended` is how many epochs were brought to their end, files and all. The end of one follows its last
        step, so a run may have stopped between the two: then it is that epoch, of which no step is left.
        """
        done, into_the_next = divmod(after_step, self.steps_per_epoch)
        return done if done and into_the_next == 0 and ended == done - 1 else done + 1

    def batches_done(self, *, after_step: int, ended: int) -> int:
        """How many batches of the epoch in which a run goes on (`first_epoch`) are done."""
        before = (self.first_epoch(after_step=after_step, ended=ended) - 1) * self.steps_per_epoch
        return min((after_step - before) * self.accumulation, self.batches_per_epoch)

    def epochs(self, *, after_step: int = 0, ended: int = 0) -> Iterator[Epoch]:
        """The epochs of the run from there on (`first_epoch`), in order, with the steps that are left."""
        for number in range(self.first_epoch(after_step=after_step, ended=ended), self.num_epochs + 1):
            batches = self.epoch_batches(number)
            before = (number - 1) * self.steps_per_epoch
            steps = [
                Step(before + index + 1, batches[index * self.accumulation : (index + 1) * self.accumulation])
                for index in range(min(self.steps_per_epoch, self.max_steps - before))
            ]
            left = [step for step in steps if step.number > after_step]
            yield Epoch(number, left, complete=len(steps) == self.steps_per_epoch)
