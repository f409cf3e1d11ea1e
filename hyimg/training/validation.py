"""Validation: the loss on images that are held back, asked the same way every time.

A loss that is drawn anew at each asking moves more by its noise levels than by what was learnt. So here each
image is shown with one noise and at a fixed grid of noise levels, one in the middle of each band; nothing is
drawn that training draws too. As many training images are asked in the same way: the two losses compare, and
their difference, the divergence, grows where the images are learnt by heart.

Shapes: B batch
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyimg.config.run import Validation
from hyimg.data.batches import Batch, epoch_batches
from hyimg.data.sample import Sample
from hyimg.data.training_data import LoadedBatch, TrainingData
from hyimg.errors import HyimgError
from hyimg.memory.processes import Processes
from hyimg.model.conditioning import collate
from hyimg.randomness import keyed_random
from hyimg.training.bands import BANDS, band_name, band_of
from hyimg.training.objective import Objective

# What draws are keyed by in place of an epoch, so that they are never those of training
_EPOCH = "validation"


@dataclass(frozen=True)
class Measurement:
    """Mean losses of one asking: over all images and noise levels, and by band (those that were asked)."""

    loss: float
    by_band: Mapping[int, float]


class Validator:
    """Measures the model on held-back images and, beside them, on as many training images.

    `held_back` and `familiar` are data that show each image plainly (`TrainingData(..., plain=True)`). At most
    `max_batches` batches of each are asked. Several processes share them; the numbers are the same.
    """

    def __init__(
        self,
        objective: Objective,
        held_back: TrainingData,
        familiar: TrainingData,
        *,
        max_batches: int | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.objective = objective
        self.processes = processes or Processes()
        self.held_back = held_back
        self.familiar = familiar
        self.batches = epoch_batches(held_back.samples, seed=0, epoch=0, shuffle=False)[:max_batches]
        self.familiar_batches = epoch_batches(familiar.samples, seed=0, epoch=0, shuffle=False)[:max_batches]
        flow = objective.flow
        self.sigmas = grid(flow.min_timestep, flow.max_timestep)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The numbers of one validation as metrics: losses overall and by band, and the divergence."""
        held_back = self._ask(self.held_back, self.batches)
        familiar = self._ask(self.familiar, self.familiar_batches)
        values = {"validation_loss": held_back.loss, "validation_train_loss": familiar.loss}
        values["validation_divergence"] = held_back.loss - familiar.loss
        for prefix, measured in (("validation_loss", held_back), ("validation_train_loss", familiar)):
            values |= {f"{prefix}_{band_name(band)}": loss for band, loss in sorted(measured.by_band.items())}
        return values

    def _ask(self, data: TrainingData, batches: Sequence[Batch]) -> Measurement:
        own: list[tuple[int, list[float]]] = []
        for batch in batches[self.processes.rank :: self.processes.world]:
            loaded = data[0, batch]
            own += [(band_of(sigma * 1000), self._losses(loaded, sigma).tolist()) for sigma in self.sigmas]
        losses: dict[int, list[float]] = {}
        for band, of_batch in itertools.chain.from_iterable(self.processes.gather(own)):
            losses.setdefault(band, []).extend(of_batch)
        every = [loss for band in losses.values() for loss in band]
        return Measurement(_mean(every), {band: _mean(of_band) for band, of_band in losses.items()})

    def _losses(self, batch: LoadedBatch, sigma: float) -> Tensor:
        drawn = self.objective.draw(batch, _EPOCH)
        # the plain noise: perturbing the input belongs to training
        asked = replace(
            drawn, mixed_noise_BCHW=drawn.noise_BCHW, sigma_B=torch.full_like(drawn.sigma_B, sigma)
        )
        mask_BHW = batch.alpha_mask_BHW
        return self.objective.evaluate(
            asked, collate(batch.text), None if mask_BHW is None else mask_BHW[:, None]
        )


def grid(min_timestep: float, max_timestep: float) -> list[float]:
    """The noise levels that are asked, rising: the middle of each band's part of the range that is trained."""
    middles = []
    for low, high in BANDS:
        low, high = max(low, min_timestep), min(high, max_timestep)
        if low < high:
            middles.append((low + high) / 2000)
    return middles


def familiar_samples(samples: Sequence[Sample], count: int, *, seed: int) -> list[Sample]:
    """`count` training images to compare with, each once: chosen by key, and in their own order.

    Regularisation images are left out: validation has none either.
    """
    candidates = [place for place, sample in enumerate(samples) if not sample.subset.is_reg]
    chosen = keyed_random(seed, "familiar samples").sample(candidates, min(count, len(candidates)))
    return [replace(samples[place], num_repeats=1) for place in sorted(chosen)]


@dataclass(frozen=True)
class Cadence:
    """When validation runs: every so many steps or epochs, each epoch where neither is given."""

    every_n_steps: int | None
    every_n_epochs: int | None

    @classmethod
    def of(cls, options: Validation) -> Cadence:
        if options.validate_every_n_steps is None and options.validate_every_n_epochs is None:
            return cls(None, 1)
        return cls(options.validate_every_n_steps, options.validate_every_n_epochs)

    def after_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def after_epoch(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0


def require_held_back(options: Validation, held_back: Sequence[Sample]) -> None:
    """Raises HyimgError where validation is asked for and no image is held back for it."""
    asked = [
        name
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
        if getattr(options, name) is not None
    ]
    if asked and not held_back:
        raise HyimgError(
            f"`--{asked[0]}` is given, and no image is held back for validation",
            hint="give `--validation_split 0.1`, or `validation_split` in the dataset file",
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
