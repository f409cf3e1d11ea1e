"""What a run asks of its model between steps: validation and samples. Neither leaves a trace in training.

Both look at the weights that are saved (the moving average where there is one), draw nothing that training
draws, and come before a step's files are saved, so that a resumed run neither repeats nor misses one. A plugin's
loss or sampler may draw from the global generators: there it gets the same each time, and training goes on with
what it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import set_seed

from hyimg.memory.out_of_memory import out_of_memory_place
from hyimg.report import count_text
from hyimg.training.samples import SampleCadence, SampleRenderer
from hyimg.training.state_parts import generators_part
from hyimg.training.trackers import show_images
from hyimg.training.validation import Cadence, Validator

if TYPE_CHECKING:
    from hyimg.training.run import Run


@dataclass(frozen=True)
class Evaluation:
    """The validation and the samples of a run, each where it is asked for, with the times that they come at."""

    validator: Validator | None = None
    validation_cadence: Cadence = field(default_factory=lambda: Cadence(None, None))
    samples: SampleRenderer | None = None
    sample_cadence: SampleCadence = field(default_factory=lambda: SampleCadence(None, None, False))

    def at_start(self, run: Run) -> None:
        """Before the first step: what the losses are measured against, and `--sample_at_first`."""
        if self.validator is not None:
            _validate(run, self.validator, epoch=0)
        if self.samples is not None and self.sample_cadence.at_first:
            _render_samples(run, self.samples, step=0)

    def after_step(self, run: Run) -> None:
        """After a step, in the epoch that is under way."""
        if self.validator is not None and self.validation_cadence.after_step(run.step):
            _validate(run, self.validator, epoch=run.epoch + 1)
        if self.samples is not None and self.sample_cadence.after_step(run.step):
            _render_samples(run, self.samples, step=run.step)

    def after_epoch(self, run: Run) -> None:
        """After an epoch; what its last step has asked already is not asked again."""
        by_step = self.validation_cadence.after_step(run.step)
        if self.validator is not None and self.validation_cadence.after_epoch(run.epoch) and not by_step:
            _validate(run, self.validator, epoch=run.epoch)
        if self.samples is not None and self.sample_cadence.after_epoch(run.epoch):
            _render_samples(run, self.samples, epoch=run.epoch)


def _validate(run: Run, validator: Validator, *, epoch: int) -> None:
    with _undisturbed(run):
        values = validator.measure()
    run.metrics.write({"step": run.step, "epoch": epoch, **values})
    run.accelerator.log(values, step=run.step)
    run.report.note(
        f"step {run.step}: validation loss {values['validation_loss']:.4f}, on training images in the same way "
        f"{values['validation_train_loss']:.4f}"
    )


def _render_samples(
    run: Run, samples: SampleRenderer, *, epoch: int | None = None, step: int | None = None
) -> None:
    def path_of(number: int) -> Path:
        return run.folder.sample_path(number, epoch=epoch, step=step)

    own: dict[int, Path] = {}
    with _undisturbed(run), run.processes.one_voice(run.report) as voice:
        try:
            own = samples.render(path_of, voice)
        except Exception as error:
            if out_of_memory_place(error) is None:
                raise
            voice.warning(
                "out of memory: no samples this time, and training goes on; a smaller size in the prompt file "
                "or `--vae_tile_size 512` needs less"
            )
    shares = run.processes.gather([(number, str(path)) for number, path in own.items()])
    rendered = sorted((number, Path(path)) for share in shares for number, path in share)
    if rendered and run.processes.is_main:
        show_images(run.accelerator, rendered, run.step)
        run.report.note(f"step {run.step}: {count_text(len(rendered), 'sample')} in {run.folder.sample_dir}")


@contextmanager
def _undisturbed(run: Run) -> Iterator[None]:
    """The weights to evaluate, at their full strength (each training batch sets its own again), and the global
    generators at the run's seed; afterwards all is as it was."""
    generators = generators_part(run.exchange.device)
    before = generators.state_dict()
    set_seed(run.seed % 2**32)
    try:
        with run.evaluation_weights():
            run.network.set_multiplier(1.0)
            yield
    finally:
        generators.load_state_dict(before)
