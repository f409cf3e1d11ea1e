"""The loss of the micro DiT: the project's own objective on pictures of the small world, with all weights trained.

Shapes: N pictures of the set, B batch, C latent channels, H W latent pixels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hyimg.cache.atomic import atomic_write_bytes
from hyimg.config.flow import FlowMatching
from hyimg.data.sample import EMPTY_PROMPT
from hyimg.data.training_data import LoadedBatch
from hyimg.encoders.text import TextEncoders
from hyimg.flow import losses, timesteps
from hyimg.micro.architectures import MICRO_DIT
from hyimg.micro.recipe import Recipe
from hyimg.micro.vae_fit import to_image
from hyimg.micro.world import Scene, caption, training_scene
from hyimg.model.dit import DiT
from hyimg.model.random_init import init_random
from hyimg.model.vae import VAE
from hyimg.randomness import keyed_random
from hyimg.report import Reporter
from hyimg.training.objective import Objective

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
def encode_pictures(vae: VAE, number: int, path: Path, report: Reporter) -> None:
    """Draws the training pictures 0 to `number` - 1, encodes them, and writes their posteriors to `path`."""
    means, stds = [], []
    with report.task("encode", number, unit="picture") as task:
        for start in range(0, number, _BATCH):
            numbers = range(start, min(start + _BATCH, number))
            posterior = vae.encode(to_image([(PICTURE_SEED, one) for one in numbers]).to(vae.device))
            means.append(posterior.mean_BCHW.cpu())
            stds.append(posterior.std_BCHW.cpu())
            task.advance(len(numbers))
    atomic_write_bytes(path, save({"mean": torch.cat(means), "std": torch.cat(stds)}))


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
            text=[(encoded.text_TD, encoded.byt5_SE) for encoded in self.encoders.encode(prompts)],
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
