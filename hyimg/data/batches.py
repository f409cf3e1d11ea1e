"""The order of an epoch: which samples are trained together, and when.

    batches = epoch_batches(samples, seed=seed, epoch=epoch)
    mine = batches[rank::world]

Every sample is there `num_repeats` times; a batch is of one dataset and one bucket; the last short batch of
a bucket is kept. The order is a function of (seed, epoch) and of the samples, of nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hyimg.data.buckets import Size
from hyimg.data.collector import collector_paused
from hyimg.data.sample import Sample
from hyimg.randomness import keyed_random


@dataclass(frozen=True)
class Batch:
    """Places in the list of samples, and which of its repeats (from 0) each one is."""

    samples: tuple[int, ...]
    repeats: tuple[int, ...]
    bucket: Size

    def __len__(self) -> int:
        return len(self.samples)


@collector_paused()
def epoch_batches(samples: Sequence[Sample], *, seed: int, epoch: int, shuffle: bool = True) -> list[Batch]:
    """The batches of an epoch, in order. `shuffle=False` keeps the samples' order, for validation."""
    groups: defaultdict[tuple[int, Size], list[tuple[int, int]]] = defaultdict(list)
    for place, sample in enumerate(samples):
        turns = groups[sample.dataset_index, sample.bucket]
        turns.extend((place, repeat) for repeat in range(sample.num_repeats))
    batches: list[Batch] = []
    for (dataset_index, bucket), turns in sorted(groups.items()):
        if shuffle:
            keyed_random(seed, epoch, "order", dataset_index, bucket).shuffle(turns)
        size = samples[turns[0][0]].batch_size
        for start in range(0, len(turns), size):
            places, repeats = zip(*turns[start : start + size], strict=True)
            batches.append(Batch(places, repeats, bucket))
    if shuffle:
        keyed_random(seed, epoch, "order of batches").shuffle(batches)
    return batches
