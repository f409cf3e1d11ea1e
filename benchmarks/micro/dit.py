"""The loss of the micro DiT: the project's own objective on pictures of the small world, with all weights trained.

Shapes: N pictures of the set, B batch, C latent channels, H W latent pixels

Training all weights of a model: the loop that the VAE and the DiT of the micro model share.

A step's loss is a function of its number, and the state is written whole or not at all, so that a build that was
killed at any moment resumes to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.micro.recipe import Fit, Recipe
from benchmarks.micro.text_encoders import MICRO_DIT
from benchmarks.micro.vae import to_image
from hyimg.cache.atomic import atomic_write_bytes
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.config.training import FlowMatching
from hyimg.data.batches import LoadedBatch
from hyimg.data.samples import EMPTY_PROMPT
from hyimg.demo.world import Scene, caption, training_scene
from hyimg.encoders.text import TextEncoders
from hyimg.errors import RunError
from hyimg.flow import losses, timesteps
from hyimg.model.dit import DiT
from hyimg.model.loading import init_random
from hyimg.model.vae import VAE
from hyimg.randomness import keyed_random
from hyimg.report import Reporter
from hyimg.training.ema import AdapterEMA
from hyimg.training.metrics import MetricsLog
from hyimg.training.objective import Objective
from hyimg.training.resume import Stateful
from hyimg.training.state import MANIFEST, METRICS, pack, read_state, unpack, write_state
from hyimg.training.stepping import Stepper

# Encoded at a time
_BATCH = 32

PICTURE_SEED = 1
"""Keys the set's scenes and pictures; those of the VAE have the recipe's seed and a number of their own."""


def make_dit(seed: int) -> DiT:
    """The DiT with its first weights, a function of the seed: blocks that change nothing, and the answer 0.

    Modulation that begins at zero: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).
    """
    dit = DiT(MICRO_DIT)
    init_random(dit, seed)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if "_mod." in name or "modulation" in name.lower() or name.startswith("final_layer.linear"):
                parameter.zero_()
    return dit


@dataclass(frozen=True)
class EncodedPictures:
    """The posteriors of the training pictures 0 to N-1, scaled, float32 on the CPU."""

    mean_NCHW: Tensor
    std_NCHW: Tensor

    def __len__(self) -> int:
        return len(self.mean_NCHW)

    @staticmethod
    def load(path: Path) -> EncodedPictures:
        """Those of a file of `encode_pictures`."""
        tensors = load_file(path)
        return EncodedPictures(tensors["mean"], tensors["std"])


@torch.no_grad()
def encode_pictures(vae: VAE, number: int, path: Path, report: Reporter, *, root: Path | None = None) -> None:
    """Draws the training pictures 0 to `number` - 1, encodes them, and writes their posteriors to `path`.

    `root` as for `atomic_path`.
    """
    means, stds = [], []
    with report.task("encode", number, unit="picture") as task:
        for start in range(0, number, _BATCH):
            numbers = range(start, min(start + _BATCH, number))
            posterior = vae.encode(to_image([(PICTURE_SEED, one) for one in numbers]).to(vae.device))
            means.append(posterior.mean_BCHW.cpu())
            stds.append(posterior.std_BCHW.cpu())
            task.advance(len(numbers))
    data = save({"mean": torch.cat(means), "std": torch.cat(stds)})
    atomic_write_bytes(path, data, root=root, verify=read_header)


@dataclass(frozen=True)
class DiTLoss:
    """A step's loss as a function of its number: which pictures, which captions, which noise."""

    dit: DiT
    pictures: EncodedPictures
    encoders: TextEncoders
    recipe: Recipe

    def __call__(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        objective = Objective(
            self.dit,
            losses.l2,
            timesteps.sigma,
            FlowMatching(discrete_flow_shift=self.recipe.flow_shift),
            self.recipe.seed,
        )
        loss_B, _ = objective(self.batch(step), step)
        return loss_B.mean(), {}

    def batch(self, step: int) -> LoadedBatch:
        """The batch of a step; a sample's noise is keyed by its place, since a picture may come twice.

        Its captions have one phrasing, and all or none of its pictures have a letter: then prompts are equally long,
        and attention takes the batch at once. A step in ten, by the usual recipe, has no captions.
        """
        size, seed = self.recipe.dit.batch_size, self.recipe.seed
        random = keyed_random(seed, step, "batch")
        with_letter = random.choice(self._scenes()).letter is not None
        numbers = [
            number for number, scene in enumerate(self._scenes()) if (scene.letter is not None) == with_letter
        ]
        chosen = random.choices(numbers, k=size)
        if random.random() < self.recipe.caption_dropout:
            prompts = [EMPTY_PROMPT] * size
        else:
            prompts = [caption(self._scenes()[number], seed, step) for number in chosen]
        chosen_B = torch.tensor(chosen)
        return LoadedBatch(
            mean_BCHW=self.pictures.mean_NCHW[chosen_B],
            std_BCHW=self.pictures.std_NCHW[chosen_B],
            text=self.encoders.encode(prompts),
            weights_B=torch.ones(size),
            alpha_mask_BHW=None,
            sample_keys=tuple(str(number) for number in chosen),
            repeats=tuple(range(size)),
            prompts=tuple(prompts),
            network_multiplier=1.0,
            custom_attributes=(None,) * size,
        )

    def _scenes(self) -> Sequence[Scene]:
        return _scenes(len(self.pictures))


@cache
def _scenes(number: int) -> tuple[Scene, ...]:
    """What the set's pictures show."""
    return tuple(training_scene(PICTURE_SEED, one) for one in range(number))


StepLoss = Callable[[int], tuple[Tensor, Mapping[str, float]]]
"""Number of a step, from 0 -> its loss with its graph, and what else the log records."""

LOG_EVERY = 20
"""Steps of which a line of the log has the means."""
SAVE_EVERY = 200
"""A multiple of it, so that what is logged does not depend on where a build was stopped."""


class Fitting:
    """One model's way from its first weights to its average.

    `folder` takes the state, which must be of the same recipe, `log_path` a JSON line every 20 steps.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        fit: Fit,
        loss: StepLoss,
        *,
        folder: Path,
        log_path: Path,
        report: Reporter,
    ) -> None:
        from transformers.optimization import get_cosine_schedule_with_warmup

        self.name = name
        self.model = model
        self.fit = fit
        self.loss = loss
        self.state_path = folder / f"{name}-state"
        self.log_path = log_path
        self.report = report
        optimizer = torch.optim.AdamW(model.parameters(), fit.learning_rate, weight_decay=fit.weight_decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, fit.warmup_steps, fit.steps)
        self.stepper = Stepper(optimizer, max_grad_norm=fit.max_grad_norm, scheduler=schedule)
        self.ema = AdapterEMA(model, fit.ema_decay)
        self.parts = [
            Stateful("model", model.state_dict, model.load_state_dict),
            Stateful("optimizer", optimizer.state_dict, optimizer.load_state_dict),
            Stateful("schedule", schedule.state_dict, schedule.load_state_dict),
            Stateful("ema", self.ema.state_dict, self.ema.load_state_dict),
        ]

    def run(self, *, stop_after: int | None = None) -> None:
        """Trains to the end, from the state where there is one; the model then holds its average.

        `stop_after` leaves it at that step. Raises RunError for a loss that is not finite, HyimgError for a damaged
        state.
        """
        first, prepare_log = self._resume()
        last = self.fit.steps if stop_after is None else min(stop_after, self.fit.steps)
        with (
            MetricsLog(self.log_path, prepare_log) as log,
            self.report.task(self.name, self.fit.steps, unit="step", done=first) as task,
        ):
            started, window = time.monotonic(), list[dict[str, float]]()
            for step in range(first, last):
                values = self._step(step)
                done = step + 1
                window.append({**values, "seconds_a_step": time.monotonic() - started})
                started = time.monotonic()
                if done % LOG_EVERY == 0 or done == self.fit.steps:
                    means = {name: fmean(one[name] for one in window) for name in window[0]}
                    log.write({"step": done, **{name: round(mean, 5) for name, mean in means.items()}})
                    window.clear()
                task.advance(detail=f"loss {values['loss']:.4f}")
                if done % SAVE_EVERY == 0 or done == last:
                    self._save(done, log)
        self.model.load_state_dict(self.model.state_dict() | self.ema.state_dict()["averages"])

    def _step(self, step: int) -> dict[str, float]:
        loss, details = self.loss(step)
        self.stepper.backward(loss)
        norm = self.stepper.gradient_norm()
        value = float(loss.detach())
        if not torch.isfinite(torch.tensor([value, norm])).all():
            raise RunError(
                f"the loss of the {self.name} is {value} at step {step + 1}", hint="lower its learning rate"
            )
        self.stepper.step()
        self.ema.update()
        return {"loss": value, **details, "gradient_norm": norm}

    def _resume(self) -> tuple[int, Callable[[Path], object] | None]:
        """How many steps were done, and what makes the log that of those."""
        if not (self.state_path / MANIFEST).is_file():
            return 0, None
        state = read_state(self.state_path)
        for part in self.parts:
            part.load_state_dict(unpack(state.document["parts"][part.name], state.tensors(part.name)))
        return int(state.document["step"]), state.restore_log

    def _save(self, step: int, log: MetricsLog) -> None:
        trees, tensors = {}, {}
        for part in self.parts:
            trees[part.name], tensors[part.name] = pack(part.state_dict())
        document = {"step": step, "parts": trees, METRICS: log.position}
        write_state(self.state_path, document, tensors, root=self.state_path.parent)
