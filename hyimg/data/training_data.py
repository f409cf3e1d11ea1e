"""Batches as tensors, read from the caches: what the training loop sees of the data.

    data = TrainingData(samples, latent_store, text_store, seed=seed)
    loader = BatchLoader(data, num_workers=2)
    for batch in loader.load(epoch_batches(samples, seed=seed, epoch=epoch)[rank::world], epoch=epoch):
        latent_BCHW = batch.mean_BCHW + batch.std_BCHW * keyed_noise

Shapes: B batch, C latent channels, H W latent height and width, T text tokens, D text width, S glyph tokens,
E byT5 width. Latents are already scaled (by 0.75289).
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hyimg.cache.entries import DamagedEntryError, MissingEntryError
from hyimg.cache.latents import LatentEntry, LatentStore
from hyimg.cache.text import TextEntry, TextStore
from hyimg.data.batches import Batch
from hyimg.data.sample import Choice, Sample, choose
from hyimg.errors import HyimgError


@dataclass(frozen=True)
class LoadedBatch:
    """One batch on the CPU.

    `mean_BCHW` and `std_BCHW` are the latents' posteriors, float32. `text` holds for each sample the text
    tokens and, where its prompt quotes text, the glyph tokens, in the cache's precision. `weights_B` are
    factors of the losses (float32; `prior_loss_weight` for regularisation images). `alpha_mask_BHW` weights
    the loss in 0..1 (float32, 1 for samples without a mask), and is None where no sample has a mask.
    `sample_keys` and `repeats` are what each sample's randomness is keyed by.
    """

    mean_BCHW: torch.Tensor
    std_BCHW: torch.Tensor
    text: list[tuple[torch.Tensor, torch.Tensor | None]]
    weights_B: torch.Tensor
    alpha_mask_BHW: torch.Tensor | None
    sample_keys: tuple[str, ...]
    repeats: tuple[int, ...]
    prompts: tuple[str, ...]
    network_multiplier: float
    custom_attributes: tuple[Mapping[str, object] | None, ...]

    def __len__(self) -> int:
        return len(self.sample_keys)


class TrainingData(torch.utils.data.Dataset[LoadedBatch]):
    """Reads batches of `samples` from the stores; an item is asked for as (epoch, batch).

    With `plain` a sample always shows the same: the first variant of its caption, not mirrored.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        latent_store: LatentStore,
        text_store: TextStore,
        *,
        seed: int,
        plain: bool = False,
    ) -> None:
        self.samples = samples
        self.plain = plain
        self.latent_store = latent_store
        self.text_store = text_store
        self.seed = seed

    def __getitem__(self, request: tuple[int, Batch]) -> LoadedBatch:
        """Raises `HyimgError` for an entry that is missing or damaged, with the command that makes it."""
        epoch, batch = request
        samples = [self.samples[place] for place in batch.samples]
        choices = [
            Choice(sample.prompts[0], flipped=False)
            if self.plain
            else choose(sample, seed=self.seed, epoch=epoch, repeat=repeat)
            for sample, repeat in zip(samples, batch.repeats, strict=True)
        ]
        latents: list[LatentEntry] = []
        texts: list[TextEntry] = []
        for sample, choice in zip(samples, choices, strict=True):
            try:
                latents.append(self.latent_store.read(sample.recipe(choice.flipped)))
                texts.append(self.text_store.read(choice.prompt))
            except (MissingEntryError, DamagedEntryError) as error:
                where = f"{error.message} (needed for `{sample.image_path}`)"
                raise type(error)(where, hint=error.hint) from error
        mean_BCHW = torch.stack([entry.mean_CHW for entry in latents]).float()
        return LoadedBatch(
            mean_BCHW=mean_BCHW,
            std_BCHW=torch.stack([entry.std_CHW for entry in latents]).float(),
            text=[(entry.text_TD, entry.byt5_SE) for entry in texts],
            weights_B=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
            alpha_mask_BHW=_stack_masks([entry.alpha_mask_HW for entry in latents], mean_BCHW),
            sample_keys=tuple(sample.key for sample in samples),
            repeats=batch.repeats,
            prompts=tuple(choice.prompt for choice in choices),
            network_multiplier=samples[0].dataset.network_multiplier,
            custom_attributes=tuple(sample.subset.custom_attributes for sample in samples),
        )


class BatchLoader:
    """Loads batches in order, ahead of their use where there are worker processes.

    `num_workers` 0 reads in this process; `persistent_workers` keeps the processes between epochs.
    """

    def __init__(self, data: TrainingData, *, num_workers: int = 0, persistent_workers: bool = False) -> None:
        self.data = data
        self._requests = _Requests()
        self._loader: torch.utils.data.DataLoader[LoadedBatch | HyimgError] = torch.utils.data.DataLoader(
            _WithErrors(data),
            batch_size=None,
            sampler=self._requests,
            num_workers=num_workers,
            persistent_workers=persistent_workers and num_workers > 0,
            worker_init_fn=_ignore_interrupts,
            # torch draws a seed for its workers at every epoch: not from the global generator
            generator=torch.Generator(),
        )

    def keys(self, batch: Batch) -> list[str]:
        """The keys of a batch's samples, without loading it."""
        return [self.data.samples[place].key for place in batch.samples]

    def load(self, batches: Iterable[Batch], *, epoch: int) -> Iterator[LoadedBatch]:
        """The tensors of `batches`, in order; `epoch` counts from 1. Raises as `TrainingData`."""
        self._requests.requests = [(epoch, batch) for batch in batches]
        for loaded in self._loader:
            if isinstance(loaded, HyimgError):
                raise loaded
            yield loaded


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; that which trains decides what becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _WithErrors(torch.utils.data.Dataset["LoadedBatch | HyimgError"]):
    """Hands user errors over as values: raised in a worker they would arrive as the text of a traceback."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __getitem__(self, request: tuple[int, Batch]) -> LoadedBatch | HyimgError:
        try:
            return self.data[request]
        except HyimgError as error:
            return error


class _Requests(torch.utils.data.Sampler[tuple[int, Batch]]):
    """What a loader is to load; it asks for a fresh iterator at each epoch."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, Batch]] = []

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def _stack_masks(masks: Sequence[torch.Tensor | None], mean_BCHW: torch.Tensor) -> torch.Tensor | None:
    if all(mask is None for mask in masks):
        return None
    height, width = mean_BCHW.shape[-2:]
    whole_HW = torch.ones(height, width)
    return torch.stack([whole_HW if mask is None else mask.float() for mask in masks])
