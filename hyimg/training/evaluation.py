"""Evaluation between steps: validation losses and samples. Neither changes the training that follows.

Both use the weights that are saved (the moving average if there is one) and come before a step's files are saved,
so that a resumed run neither repeats nor misses one. Their random draws have keys of their own. A plugin's loss or
sampler may use the global generators: these are seeded for the evaluation and restored after it.

Validation measures the loss on held-back images the same way every time. With freshly sampled noise, sampling
variance would dominate it; here each image has one fixed noise and a fixed grid of noise levels, the middle of each
band. As many training images are measured the same way, so that the two losses are comparable: their difference,
the divergence, grows with overfitting.

Shapes: B batch
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed

from hyimg.checkpoints.architecture import SPATIAL_FACTOR
from hyimg.data.batches import TrainingData
from hyimg.data.samples import Sample, epoch_batches
from hyimg.data.workspace import Workspace
from hyimg.distributed.processes import Processes
from hyimg.errors import out_of_memory_place
from hyimg.model.dit import collate
from hyimg.randomness import keyed_random
from hyimg.report import count_text
from hyimg.training.metrics import BANDS, band_name, band_of
from hyimg.training.objective import Objective
from hyimg.training.previews import PreviewRenderer, sampling_of
from hyimg.training.resume import generators_part
from hyimg.training.run import Run
from hyimg.training.trackers import log_images

# Takes the place of the epoch in the keys of draws, so that they never equal those of training
_EPOCH = "validation"

DEFAULT_SEED = 0
"""The seed without `--validation_seed`: a constant, so that runs with different seeds are comparable."""


@dataclass(frozen=True)
class Cadence:
    """When something is due: every so many steps or epochs, and possibly before the first step."""

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at_start: bool = False

    def after_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def after_epoch(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0


class Evaluation:
    """The validation and the samples of a run, as far as its options ask for them, and their cadences."""

    def __init__(self, run: Run, workspace: Workspace) -> None:
        options = run.config.validation
        # what is not requested otherwise is due after each epoch
        validate = Cadence(options.validate_every_n_steps, options.validate_every_n_epochs)
        self.validate = validate if validate != Cadence() else Cadence(None, 1)
        sample = Cadence(options.sample_every_n_steps, options.sample_every_n_epochs, options.sample_at_first)
        self.sample = sample if sample != Cadence() else Cadence(None, 1)
        self.validator = _validator(run, workspace)
        self.previews = _previews(run, workspace)

    def at_start(self, run: Run) -> None:
        """Before the first step: the baseline of the validation losses, and `--sample_at_first`."""
        if self.validator is not None:
            _validate(run, self.validator, epoch=0)
        if self.previews is not None and self.sample.at_start:
            _render_previews(run, self.previews, step=0)

    def after_step(self, run: Run) -> None:
        """After a step, within an epoch."""
        if self.validator is not None and self.validate.after_step(run.step):
            _validate(run, self.validator, epoch=run.epoch + 1)
        if self.previews is not None and self.sample.after_step(run.step):
            _render_previews(run, self.previews, step=run.step)

    def after_epoch(self, run: Run) -> None:
        """After an epoch; a validation that its last step has already caused is not repeated."""
        by_step = self.validate.after_step(run.step)
        if self.validator is not None and self.validate.after_epoch(run.epoch) and not by_step:
            _validate(run, self.validator, epoch=run.epoch)
        if self.previews is not None and self.sample.after_epoch(run.epoch):
            _render_previews(run, self.previews, epoch=run.epoch)


class Validator:
    """Measures the model on held-back images and on as many training images.

    `seed` decides each image's noise and the draws of a loss that draws: equal validation seeds give comparable
    numbers, whatever the runs' own seeds. Both data sets must be plain (`TrainingData(..., plain=True)`). At most
    `max_batches` batches of each are measured. Several processes share the work; the numbers are the same.
    """

    def __init__(
        self,
        objective: Objective,
        held_back: TrainingData,
        training: TrainingData,
        *,
        seed: int = DEFAULT_SEED,
        max_batches: int | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.objective = replace(objective, seed=seed)
        self.seed = seed
        self.max_batches = max_batches
        self.processes = processes or Processes()
        self.held_back = held_back
        self.training = training
        self.sigmas = sigma_grid(objective.flow.min_timestep, objective.flow.max_timestep)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """One validation as metrics: losses overall and by band, and the divergence."""
        values: dict[str, float] = {}
        of_bands: dict[str, float] = {}
        for name, data in (("validation_loss", self.held_back), ("validation_train_loss", self.training)):
            by_band = self._losses_by_band(data)
            values[name] = _mean([loss for losses in by_band.values() for loss in losses])
            of_bands |= {f"{name}_{band_name(band)}": _mean(by_band[band]) for band in sorted(by_band)}
        values["validation_divergence"] = values["validation_loss"] - values["validation_train_loss"]
        return values | of_bands

    def _losses_by_band(self, data: TrainingData) -> dict[int, list[float]]:
        batches = epoch_batches(data.samples, seed=0, epoch=0, shuffle=False)[: self.max_batches]
        own: list[tuple[int, list[float]]] = []
        for batch in batches[self.processes.rank :: self.processes.world]:
            loaded = data[0, batch]
            drawn = self.objective.draw(loaded, _EPOCH)
            mask_BHW = loaded.alpha_mask_BHW
            for sigma in self.sigmas:
                # plain noise: perturbing the input belongs to training
                fixed = replace(
                    drawn, mixed_noise_BCHW=drawn.noise_BCHW, sigma_B=torch.full_like(drawn.sigma_B, sigma)
                )
                loss_B = self.objective.evaluate(
                    fixed, collate(loaded.text), None if mask_BHW is None else mask_BHW[:, None]
                )
                own.append((band_of(sigma * 1000), loss_B.tolist()))
        losses: dict[int, list[float]] = {}
        for band, of_batch in itertools.chain.from_iterable(self.processes.gather(own)):
            losses.setdefault(band, []).extend(of_batch)
        return losses


def sigma_grid(min_timestep: float, max_timestep: float) -> list[float]:
    """Increasing noise levels (0..1): the middle of each band's overlap with the trained range (timesteps 0..1000)."""
    middles = []
    for low, high in BANDS:
        low, high = max(low, min_timestep), min(high, max_timestep)
        if low < high:
            middles.append((low + high) / 2000)
    return middles


def training_subset(samples: Sequence[Sample], count: int, *, seed: int) -> list[Sample]:
    """`count` training images to compare with, each once, chosen by key, in their own order.

    Regularisation images are excluded, as they are from validation.
    """
    candidates = [index for index, sample in enumerate(samples) if not sample.subset.is_reg]
    # the key decides which images: changing it would make validation losses incomparable
    chosen = keyed_random(seed, "familiar samples").sample(candidates, min(count, len(candidates)))
    return [replace(samples[index], num_repeats=1) for index in sorted(chosen)]


def _validator(run: Run, workspace: Workspace) -> Validator | None:
    held_back, options = workspace.found.validation, run.config.validation
    if not held_back:
        return None
    seed = options.validation_seed if options.validation_seed is not None else DEFAULT_SEED
    if run.resumed is not None and run.resumed.validation_seed not in (None, seed):
        run.report.warning(
            f"validation used seed {run.resumed.validation_seed} before this state and uses {seed} now "
            "(`--validation_seed`): the losses are not comparable"
        )
    training = training_subset(workspace.found.samples, len(held_back), seed=seed)
    data = run.loader.data
    return Validator(
        run.objective,
        *(
            TrainingData(samples, data.latent_store, data.text_store, seed=seed, plain=True)
            for samples in (held_back, training)
        ),
        seed=seed,
        max_batches=options.max_validation_steps,
        processes=run.processes,
    )


def _validate(run: Run, validator: Validator, *, epoch: int) -> None:
    with _undisturbed(run, seed=validator.seed):
        values = validator.measure()
    run.validation_seed = validator.seed
    run.metrics.write({"step": run.step, "epoch": epoch, **values})
    run.accelerator.log(values, step=run.step)
    run.report.note(
        f"step {run.step}: validation loss {values['validation_loss']:.4f}, loss on as many training images "
        f"{values['validation_train_loss']:.4f}"
    )


def _previews(run: Run, workspace: Workspace) -> PreviewRenderer | None:
    plan, config = run.prepared.previews, run.config
    if plan is None:
        return None
    width, height = (
        max(SPATIAL_FACTOR, side // SPATIAL_FACTOR * SPATIAL_FACTOR)
        for side in workspace.dataset_file.datasets[0].resolution
    )
    return PreviewRenderer(
        # prompts without a size are rendered at the training resolution
        replace(plan, options=sampling_of(config.validation, (height, width))),
        run.objective.dit,
        run.loader.data.text_store,
        config.vae,
        config.compute,
        run.prepared.precision,
        config.dit.dit,
        processes=run.processes,
    )


def _render_previews(
    run: Run, previews: PreviewRenderer, *, epoch: int | None = None, step: int | None = None
) -> None:
    def path_of(number: int) -> Path:
        return run.folder.sample_path(number, epoch=epoch, step=step)

    own: dict[int, Path] = {}
    with _undisturbed(run, seed=run.seed), run.processes.rank0_reporter(run.report) as report:
        try:
            own = previews.render(path_of, run.folder.directory, report)
        except Exception as error:
            if out_of_memory_place(error) is None:
                raise
            report.warning(
                "out of memory: no samples this time; training continues. A smaller size in the prompt file "
                "or `--vae_tile_size 512` needs less memory"
            )
    shares = run.processes.gather([(number, str(path)) for number, path in own.items()])
    rendered = sorted((number, Path(path)) for share in shares for number, path in share)
    if rendered and run.processes.is_main:
        log_images(run.accelerator, rendered, run.step)
        run.report.note(f"step {run.step}: {count_text(len(rendered), 'sample')} in {run.folder.sample_dir}")


@contextmanager
def _undisturbed(run: Run, *, seed: int) -> Iterator[None]:
    """A block with the weights to evaluate, at full strength (each training batch sets its own multiplier), and the
    global generators at `seed`; all are restored after it."""
    generators = generators_part(run.device)
    before = generators.state_dict()
    set_seed(seed % 2**32)
    try:
        with run.evaluation_weights():
            run.network.set_multiplier(1.0)
            yield
    finally:
        generators.load_state_dict(before)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
