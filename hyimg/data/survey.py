"""Counting a dataset for its report: images, buckets, batches, duplicates."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from hyimg.data.batches import epoch_batches
from hyimg.data.buckets import Size
from hyimg.data.cost import image_tokens, relative_cost
from hyimg.data.report import BucketRow, DatasetRow, Epoch, Finding, Images, SubsetRow, Unreadable
from hyimg.data.sample import Sample
from hyimg.data.workspace import Workspace
from hyimg.model.architecture import NATIVE_SIZES

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
    )


def dataset_rows(workspace: Workspace) -> tuple[DatasetRow, ...]:
    # subsets of equal content are distinct values, so they are told apart by where they stand
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
    """A row for each bucket of each dataset that has images in it, in order."""
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
                tokens=image_tokens(size),
                cost=round(relative_cost(size), 4),
            )
        )
    return tuple(rows)


def count_epoch(buckets: Iterable[BucketRow], accumulation: int) -> Epoch:
    rows = list(buckets)
    batches = sum(row.batches for row in rows)
    return Epoch(
        turns=sum(row.turns for row in rows),
        batches=batches,
        steps=math.ceil(batches / accumulation),  # what is left at an epoch's end makes a smaller step
        gradient_accumulation_steps=accumulation,
        cost=round(sum(row.turns * row.cost for row in rows), 2),
    )


def bounded_sizes(workspace: Workspace) -> Iterable[str]:
    """A note for each dataset whose `max_bucket_reso` makes long images much smaller than its resolution."""
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
                f"resolution's area, because no side may be over {longest} (`max_bucket_reso`)"
            )


def find_duplicates(samples: Sequence[Sample]) -> list[Finding]:
    """Captions of several images, and images that a dataset has more than once.

    One image in several datasets (say at several resolutions) is meant, and is no finding.
    """
    by_caption: defaultdict[str, dict[str, str]] = defaultdict(dict)
    by_content: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for sample in samples:
        path = str(sample.image_path)
        by_content[sample.dataset_index, sample.image_hash].append(path)
        if sample.caption:
            by_caption[sample.caption].setdefault(sample.image_hash, path)
    captions = [
        Finding(kind="duplicate_caption", images=tuple(paths.values()), texts=(caption,))
        for caption, paths in by_caption.items()
        if len(paths) > 1
    ]
    # the same copies in a second dataset are no news
    copies = dict.fromkeys(tuple(paths) for paths in by_content.values() if len(paths) > 1)
    images = [Finding(kind="duplicate_image", images=paths) for paths in copies]
    return captions + images


def _by_place(samples: Iterable[Sample]) -> dict[_Place, list[Sample]]:
    groups: defaultdict[_Place, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.dataset_index, sample.bucket].append(sample)
    return dict(groups)
