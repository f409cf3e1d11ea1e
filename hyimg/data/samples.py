"""A sample: one image of one subset, with everything that caching and training need to know about it.

`hyimg.data.scan.scan` makes samples, and `epoch_batches` orders them:

    batches = epoch_batches(samples, seed=seed, epoch=epoch)
    prompt, flipped = choose(samples[batches[0].samples[0]], seed=seed, epoch=epoch, repeat=0)

The order is a function of (seed, epoch) and the samples, and a sample's caption variant and mirroring of
(seed, epoch, sample, repeat); no torch is needed.
"""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.latents import LatentRecipe
from hyimg.config.training import ClassCaptions
from hyimg.data.buckets import CROP_LIMIT, Placement, Size
from hyimg.data.dataset_keys import Dataset, Subset
from hyimg.data.images import filter_for
from hyimg.errors import HyimgError
from hyimg.randomness import keyed_random

EMPTY_PROMPT = ""
"""The prompt of a sample whose caption is dropped; always cached."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of one subset.

    `key` depends on the image's content and placement only, so it does not change with captions, paths and other
    images. `prompts` are the variants of its caption, as they are encoded. Sizes are (width, height) in pixels;
    `image_size` is the upright image's. `caption_is_private`: the caption's file is a link to outside of the dataset,
    so its text is not written to files that may be shared.
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
    caption_is_private: bool = False

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
        """Whether the image is enlarged for its bucket."""
        return self.placement.enlarges(self.image_size)

    @property
    def is_cropped(self) -> bool:
        """Whether the crop removes more than `CROP_LIMIT` of the image."""
        return self.placement.cropped_share > CROP_LIMIT

    @property
    def flip_variants(self) -> tuple[bool, ...]:
        """`flipped` of each latent to cache: False, and with `flip_aug` also True."""
        return (False, True) if self.subset.flip_aug else (False,)

    def recipe(self, flipped: bool = False) -> LatentRecipe:
        """The recipe of its latent entry."""
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


LatentTask = tuple[Sample, bool]
"""A latent entry: (sample, `flipped`)."""


def choose(sample: Sample, *, seed: int, epoch: int, repeat: int) -> tuple[str, bool]:
    """(prompt, `flipped`) of a sample's `repeat`-th turn (from 0) in an epoch (from 1).

    The prompt is "" if the caption is dropped: in epochs n, 2n, ... with `caption_dropout_every_n_epochs` = n, and at
    random with `caption_dropout_rate`.
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
    return prompt, subset.flip_aug and draw("flip").random() < 0.5


def class_caption(prompt: str, options: ClassCaptions) -> str:
    """A prompt with `--diff_output_preservation_class` in place of each `--trigger_word`.

    Differential output preservation as in ai-toolkit: plain text is replaced, and upper and lower case differ.
    """
    assert options.trigger_word is not None
    assert options.diff_output_preservation_class is not None
    return prompt.replace(options.trigger_word, options.diff_output_preservation_class)


def check_class_captions(options: ClassCaptions) -> None:
    """Raises HyimgError if one of the two options is given without the other, or is empty."""
    trigger_word, class_text = options.trigger_word, options.diff_output_preservation_class
    if (trigger_word is None) != (class_text is None):
        given, missing = "--trigger_word", "--diff_output_preservation_class"
        if trigger_word is None:
            given, missing = missing, given
        raise HyimgError(f"`{given}` without `{missing}`", hint="give both, or neither")
    if trigger_word is not None and not trigger_word.strip():
        raise HyimgError("`--trigger_word` is empty", hint="give the word that the captions use")
    if trigger_word is not None and trigger_word == class_text:
        raise HyimgError(
            f"`--trigger_word` and `--diff_output_preservation_class` are both `{trigger_word}`",
            hint="the class is what must not change: `woman` if the trigger word is `ohwx woman`",
        )


def class_captions(samples: Iterable[Sample], options: ClassCaptions) -> list[str]:
    """Every distinct class caption that training on `samples` may use; empty if the options are not given.

    Raises HyimgError as `check_class_captions`, and if no caption contains the trigger word.
    """
    check_class_captions(options)
    if options.trigger_word is None:
        return []
    prompts = dict.fromkeys(prompt for sample in samples for prompt in sample.prompts)
    if not any(options.trigger_word in prompt for prompt in prompts):
        raise HyimgError(
            f"no caption contains `--trigger_word` `{options.trigger_word}`",
            hint="give the word as the captions spell it; upper and lower case differ",
        )
    return list(dict.fromkeys(class_caption(prompt, options) for prompt in prompts))


@contextmanager
def gc_disabled() -> Iterator[None]:
    """No automatic garbage collection in the block (or decorated function).

    The samples of a dataset are all alive, so a collection frees nothing; but it starts after every so many new
    objects and visits each of them, which takes a third of the time with 100,000 samples.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class Batch:
    """Indices into the list of samples, and which of its repeats (from 0) each one is."""

    samples: tuple[int, ...]
    repeats: tuple[int, ...]
    bucket: Size

    def __len__(self) -> int:
        return len(self.samples)


@gc_disabled()
def epoch_batches(samples: Sequence[Sample], *, seed: int, epoch: int, shuffle: bool = True) -> list[Batch]:
    """The batches of an epoch, in order; `shuffle=False` keeps the samples' order, for validation.

    Every sample appears `num_repeats` times. A batch has one dataset and one bucket; the last short batch of a bucket
    is kept.
    """
    groups: defaultdict[tuple[int, Size], list[tuple[int, int]]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.dataset_index, sample.bucket].extend((index, n) for n in range(sample.num_repeats))
    batches: list[Batch] = []
    for (dataset_index, bucket), turns in sorted(groups.items()):
        if shuffle:
            keyed_random(seed, epoch, "order", dataset_index, bucket).shuffle(turns)
        size = samples[turns[0][0]].batch_size
        for start in range(0, len(turns), size):
            indices, repeats = zip(*turns[start : start + size], strict=True)
            batches.append(Batch(indices, repeats, bucket))
    if shuffle:
        keyed_random(seed, epoch, "order of batches").shuffle(batches)
    return batches
