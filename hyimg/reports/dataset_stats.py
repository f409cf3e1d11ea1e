"""The numbers of the dataset report: images, buckets and their compute, batches, state of the caches. No torch."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hyimg.cache.entries import EntryStore
from hyimg.cache.entry_file import EntryShapes, file_size
from hyimg.cache.index import Index
from hyimg.cache.latents import LatentStore
from hyimg.cache.prompt_embeddings import TextStore
from hyimg.checkpoints.architecture import DIT_2_1, NATIVE_SIZES, SPATIAL_FACTOR
from hyimg.data.buckets import Size
from hyimg.data.caching import latent_tasks, prompts_of
from hyimg.data.samples import LatentTask, Sample, epoch_batches
from hyimg.data.workspace import Workspace
from hyimg.reports.dataset_report import (
    BucketRow,
    CacheState,
    DatasetRow,
    EpochCost,
    Images,
    StoreState,
    SubsetRow,
    Unreadable,
)

REFERENCE_SIZE: Size = (2048, 2048)
"""The size whose relative cost is 1."""


def image_tokens(size: Size) -> int:
    """The image tokens of the DiT for (width, height) in pixels: one per latent pixel."""
    return (size[0] // SPATIAL_FACTOR) * (size[1] // SPATIAL_FACTOR)


def relative_cost(size: Size) -> float:
    """The operations of a training step on one image of a size, relative to 2048x2048.

    Only the image tokens in the blocks of HunyuanImage-2.1 are counted. All blocks cost the same: for L tokens of width
    h and an MLP of width m, the linear layers take 2 L (4 h^2 + 2 h m) operations and attention 4 L^2 h; together
    proportional to L (2 h + m + L). Backward and recomputation multiply both equally. Text tokens (about 100, compared
    with 4096) and work done once per image are ignored.
    """
    return _work(image_tokens(size)) / _work(image_tokens(REFERENCE_SIZE))


def _work(num_tokens: int) -> int:
    return num_tokens * (2 * DIT_2_1.hidden + DIT_2_1.mlp_hidden + num_tokens)


_Place = tuple[int, Size]
_SMALL_AREA = 0.75


def count_images(workspace: Workspace) -> Images:
    found = workspace.found
    return Images(
        training=sum(not sample.subset.is_reg for sample in found.samples),
        validation=len(found.validation),
        regularisation=sum(sample.subset.is_reg for sample in found.samples),
        unreadable=tuple(Unreadable(path=str(path), reason=why) for path, why in found.skipped),
        upscaled=tuple(str(s.image_path) for s in workspace.all_samples if s.is_upscaled),
        cropped=tuple(str(s.image_path) for s in workspace.all_samples if s.is_cropped),
    )


def dataset_rows(workspace: Workspace) -> tuple[DatasetRow, ...]:
    # by identity: two subsets may have equal values
    training = Counter((sample.dataset_index, id(sample.subset)) for sample in workspace.found.samples)
    held_back = Counter((sample.dataset_index, id(sample.subset)) for sample in workspace.found.validation)
    rows: list[DatasetRow] = []
    for number, dataset in enumerate(workspace.dataset_file.datasets):
        subsets = tuple(
            SubsetRow(
                source=str(subset.source),
                images=training[number, id(subset)],
                validation=held_back[number, id(subset)],
                num_repeats=subset.num_repeats,
                is_reg=subset.is_reg,
            )
            for subset in dataset.subsets
        )
        rows.append(
            DatasetRow(
                dataset=number + 1,
                resolution=dataset.resolution,
                batch_size=dataset.batch_size,
                buckets=dataset.bucket_sizes.steps is not None,
                subsets=subsets,
            )
        )
    return tuple(rows)


def bucket_rows(workspace: Workspace) -> tuple[BucketRow, ...]:
    """A row for each bucket of each dataset that has images, sorted."""
    samples, validation = workspace.found.samples, workspace.found.validation
    batches = Counter(
        (samples[batch.samples[0]].dataset_index, batch.bucket)
        for batch in epoch_batches(samples, seed=0, epoch=1)
    )
    training_at, validation_at = _by_place(samples), _by_place(validation)
    rows: list[BucketRow] = []
    for place in sorted({*training_at, *validation_at}):
        dataset_index, size = place
        own = training_at.get(place, [])
        rows.append(
            BucketRow(
                dataset=dataset_index + 1,
                size=size,
                native=size in NATIVE_SIZES,
                images=len(own),
                validation=len(validation_at.get(place, [])),
                turns=sum(sample.num_repeats for sample in own),
                batches=batches[place],
                upscaled=sum(sample.is_upscaled for sample in [*own, *validation_at.get(place, [])]),
                cropped=sum(sample.is_cropped for sample in [*own, *validation_at.get(place, [])]),
                tokens=image_tokens(size),
                cost=round(relative_cost(size), 4),
            )
        )
    return tuple(rows)


def count_epoch(buckets: Iterable[BucketRow], accumulation: int) -> EpochCost:
    rows = list(buckets)
    batches = sum(row.batches for row in rows)
    return EpochCost(
        turns=sum(row.turns for row in rows),
        batches=batches,
        steps=math.ceil(batches / accumulation),  # the last step of an epoch may be smaller
        gradient_accumulation_steps=accumulation,
        cost=round(sum(row.turns * row.cost for row in rows), 2),
    )


def bounded_sizes(workspace: Workspace) -> Iterable[str]:
    """A note for each dataset where `max_bucket_reso` makes long images much smaller than the resolution."""
    for number, dataset in enumerate(workspace.dataset_file.datasets):
        sizes = dataset.bucket_sizes
        if sizes.steps is None or sizes.no_upscale:
            continue
        longest, area = sizes.bounds[1], dataset.resolution[0] * dataset.resolution[1]
        small = sum(
            longest in sample.bucket and sample.bucket[0] * sample.bucket[1] < _SMALL_AREA * area
            for sample in workspace.found.samples
            if sample.dataset_index == number
        )
        if small:
            yield (
                f"dataset {number + 1}: {small} images are trained at less than {_SMALL_AREA:.0%} of the "
                f"resolution's area, because sides are limited to {longest} (`max_bucket_reso`)"
            )


def _by_place(samples: Iterable[Sample]) -> dict[_Place, list[Sample]]:
    groups: defaultdict[_Place, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.dataset_index, sample.bucket].append(sample)
    return dict(groups)


_NO_MODEL = ""

_StoreT = TypeVar("_StoreT", bound=EntryStore)
What = TypeVar("What")


def latent_cache_state(
    folder: Path,
    samples: Sequence[Sample],
    *,
    index: Index,
    identity: str | None,
    channels: int,
    basis: str,
) -> CacheState:
    """The state of the latent cache; with `identity`, only for that VAE.

    `channels` are the VAE's latent channels, for the size of missing entries; `basis` says where they come from.
    """

    def entries(store: LatentStore) -> dict[str, LatentTask]:
        return latent_tasks(samples, store)

    def size(task: LatentTask) -> int:
        recipe = task[0].recipe(task[1])
        width, height = (side // SPATIAL_FACTOR for side in recipe.bucket)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "mean": ("F16", (channels, height, width)),
            "std": ("F16", (channels, height, width)),
        }
        if recipe.mask is not None:
            shapes["alpha_mask"] = ("F16", (height, width))
        return file_size(shapes, vars(recipe))

    identities = None if identity is None else [identity]
    return _state(LatentStore, folder, index, identities, entries, size, basis)


def text_cache_state(
    folder: Path,
    samples: Sequence[Sample],
    extra_prompts: Iterable[str],
    *,
    index: Index,
    identities: Sequence[str] | None,
    shapes: Callable[[str], EntryShapes | None],
    basis: str,
) -> CacheState:
    """The state of the text cache; with `identities` (the encoders' in each acceptable dtype), only for the one with
    most of the prompts.

    `shapes` gives the tensors of a prompt's embedding, or None if unknown; `basis` says where they come from.
    """
    prompts = prompts_of(samples, extra_prompts)

    def entries(store: TextStore) -> dict[str, str]:
        return {store.key(prompt): prompt for prompt in prompts}

    def size(prompt: str) -> int | None:
        tensors = shapes(prompt)
        return None if tensors is None else file_size(tensors, {"prompt": prompt})

    return _state(TextStore, folder, index, identities, entries, size, basis)


def _state(
    store_type: type[_StoreT],
    folder: Path,
    index: Index,
    named: Sequence[str] | None,
    entries: Callable[[_StoreT], Mapping[str, What]],
    size: Callable[[What], int | None],
    basis: str,
) -> CacheState:
    """A state for each model with entries, or for the named one; `entries` gives the needed entries by key.

    If several are `named`, it is the one with most entries, or the first.
    """
    identities = store_type.identities(folder) if named is None else named
    states: list[StoreState] = []
    for known in identities or [_NO_MODEL]:
        store = store_type(folder, known, index=index)
        wanted = entries(store)
        good = store.good(wanted) if known else set()
        states.append(
            StoreState(
                identity=known or None,
                named=named is not None,
                cached=len(good),
                missing=len(wanted) - len(good),
                bytes_cached=sum(_file_bytes(store.path(key)) for key in good),
                bytes_missing=_total(size(what) for key, what in wanted.items() if key not in good),
            )
        )
    if named is not None:
        states = [max(states, key=lambda state: state.cached)]
    num_entries = states[0].cached + states[0].missing
    return CacheState(folder=str(folder), entries=num_entries, basis=basis, stores=tuple(states))


def _total(sizes: Iterable[int | None]) -> int | None:
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


def _file_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
