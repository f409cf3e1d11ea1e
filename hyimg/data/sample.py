"""A sample: one image of one subset with all that caching and training must know of it.

Samples are made by `hyimg.data.samples.scan`. What one shows while training (which variant of its caption,
mirrored or not) is a function of (seed, epoch, sample, repeat): `choose`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.latents import LatentRecipe
from hyimg.data.buckets import Placement, Size
from hyimg.data.dataset import Dataset, Subset
from hyimg.data.images import filter_for
from hyimg.randomness import keyed_random

EMPTY_PROMPT = ""
"""What a sample shows when its caption is dropped; always cached."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of one subset.

    `key` is stable: it follows from the image's content and placement, and stays while captions, paths and
    other images change. `prompts` are the variants of its caption, as they are encoded. Sizes are
    (width, height) in pixels; `image_size` is the image's own, as seen.
    """

    key: str
    image_path: Path
    image_hash: str
    image_size: Size
    mask_path: Path | None
    mask_hash: str | None
    placement: Placement
    caption: str
    prompts: tuple[str, ...]
    num_repeats: int
    dataset_index: int
    dataset: Dataset
    subset: Subset

    @property
    def bucket(self) -> Size:
        return self.placement.bucket

    @property
    def batch_size(self) -> int:
        return self.dataset.batch_size

    @property
    def weight(self) -> float:
        """The factor of this sample's loss: `prior_loss_weight` for regularisation images, else 1."""
        return self.dataset.prior_loss_weight if self.subset.is_reg else 1.0

    @property
    def is_upscaled(self) -> bool:
        """Whether the image is made larger on its way into the bucket."""
        return self.placement.enlarges(self.image_size)

    @property
    def views(self) -> tuple[bool, ...]:
        """The latents that are cached for it: plain, and with `flip_aug` also mirrored (True)."""
        return (False, True) if self.subset.flip_aug else (False,)

    def recipe(self, flipped: bool = False) -> LatentRecipe:
        """What its latent entry is made from."""
        resized = self.placement.resized
        return LatentRecipe(
            image=self.image_hash,
            bucket=self.placement.bucket,
            resized=resized,
            crop=self.placement.crop,
            filter=filter_for(self.image_size, resized, self.subset.resize_interpolation),
            flipped=flipped,
            mask="alpha" if self.subset.alpha_mask else self.mask_hash,
        )


@dataclass(frozen=True)
class Choice:
    """What a sample shows at one turn: the prompt ("" where the caption is dropped), mirrored or not."""

    prompt: str
    flipped: bool


def choose(sample: Sample, *, seed: int, epoch: int, repeat: int) -> Choice:
    """What `sample` shows at its `repeat`-th turn (from 0) of an epoch (from 1).

    `caption_dropout_every_n_epochs` = n drops the captions of epochs n, 2n, ...
    """

    def draw(purpose: str) -> random.Random:
        return keyed_random(seed, epoch, sample.key, repeat, purpose)

    subset = sample.subset
    every, rate = subset.caption_dropout_every_n_epochs, subset.caption_dropout_rate
    if (every > 0 and epoch % every == 0) or (rate > 0 and draw("caption dropout").random() < rate):
        prompt = EMPTY_PROMPT
    elif len(sample.prompts) == 1:
        prompt = sample.prompts[0]
    else:
        prompt = draw("caption variant").choice(sample.prompts)
    return Choice(prompt, subset.flip_aug and draw("flip").random() < 0.5)
