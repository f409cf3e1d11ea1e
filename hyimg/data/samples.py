"""Scanning: from a dataset file to its samples.

found = scan(load_dataset_file(path), Index(cache_dir))
found.samples        # to train on
found.validation     # held back by `validation_split`
found.skipped        # images that cannot be read, under on_bad_image="skip"
found.notes          # to tell the user
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyimg.cache.index import Index
from hyimg.data.buckets import Placement, Size
from hyimg.data.caption_transforms import CaptionContext, CaptionTransforms
from hyimg.data.captions import CaptionSettings, variants
from hyimg.data.collector import collector_paused
from hyimg.data.dataset import Dataset, DatasetFile, Subset
from hyimg.data.files import Findings, FoundImage, find_images
from hyimg.data.measuring import Measured, measure
from hyimg.data.sample import Sample
from hyimg.errors import HyimgError

_MOST_LISTED = 20


@dataclass(frozen=True)
class Scan:
    """What a dataset file leads to. `skipped` are images that cannot be read, with the reason."""

    samples: list[Sample]
    validation: list[Sample]
    skipped: list[tuple[Path, str]]
    notes: list[str]


@collector_paused()
def scan(
    dataset_file: DatasetFile,
    index: Index | None = None,
    *,
    caption_variants: int = 8,
    transforms: CaptionTransforms | None = None,
    on_bad_image: str = "error",
    progress: Callable[[int], None] | None = None,
) -> Scan:
    """Finds and measures every image of a dataset file; with a warm index no image is opened.

    `caption_variants` is how many variants a caption with randomness gets, after `transforms`. `on_bad_image` is
    "error", or "skip" to leave out images that cannot be read. `progress` is called with the images measured
    since its last call. Raises `HyimgError` that lists every folder, caption and image that is missing or broken.
    """
    findings = Findings(notes=list(dataset_file.notes))
    found = [[find_images(subset, findings) for subset in d.subsets] for d in dataset_file.datasets]
    _raise_problems(dataset_file, findings.problems)

    images = [image for in_dataset in found for in_subset in in_dataset for image in in_subset]
    paths = [image.path for image in images] + [i.mask_path for i in images if i.mask_path is not None]
    measured, bad = measure(paths, index or Index(None), progress)
    if on_bad_image == "error":
        _raise_problems(dataset_file, [f"cannot read the image `{path}`: {why}" for path, why in bad.items()])

    if transforms:
        captioned = (
            (image.caption, _caption_context(image, subset))
            for dataset, in_dataset in zip(dataset_file.datasets, found, strict=True)
            for subset, in_subset in zip(dataset.subsets, in_dataset, strict=True)
            for image in in_subset
        )
        transforms.check_pure(captioned)
    builder = _Builder(measured, caption_variants, transforms or CaptionTransforms())
    for number, (dataset, in_dataset) in enumerate(zip(dataset_file.datasets, found, strict=True)):
        builder.add_dataset(number, dataset, in_dataset, findings)
    if not builder.samples and not findings.problems:
        findings.problems.append(
            "there is no image to train on: every subset is left out (`num_repeats = 0`)"
        )
    _raise_problems(dataset_file, findings.problems)
    return Scan(builder.samples, builder.validation, list(bad.items()), findings.notes)


def _raise_problems(dataset_file: DatasetFile, problems: list[str]) -> None:
    if len(problems) == 1:
        raise HyimgError(problems[0], hint=f"the dataset file is `{dataset_file.path}`")
    if problems:
        lines = [f"\n  {problem}" for problem in problems[:_MOST_LISTED]]
        if (more := len(problems) - _MOST_LISTED) > 0:
            lines.append(f"\n  and {more} more")
        raise HyimgError(
            f"the dataset of `{dataset_file.path}` has {len(problems)} problems:{''.join(lines)}"
        )


class _Builder:
    """Makes samples of found and measured images."""

    def __init__(
        self, measured: dict[Path, Measured], caption_variants: int, transforms: CaptionTransforms
    ) -> None:
        self.samples: list[Sample] = []
        self.validation: list[Sample] = []
        self._measured = measured
        self._caption_variants = caption_variants
        self._transforms = transforms
        self._prompts: dict[tuple[str, CaptionSettings], tuple[str, ...]] = {}
        self._occurrences: Counter[str] = Counter()

    def add_dataset(
        self, number: int, dataset: Dataset, found: Iterable[Sequence[FoundImage]], findings: Findings
    ) -> None:
        placements: dict[Size, Placement] = {}
        training: list[Sample] = []
        for subset, images in zip(dataset.subsets, found, strict=True):
            samples: list[Sample] = []
            for image in images:
                if image.path not in self._measured or self._lacks_mask(image, findings):
                    continue
                size = self._measured[image.path].size
                if size not in placements:
                    placements[size] = dataset.bucket_sizes.place(size)
                samples.append(self._sample(image, placements[size], number, dataset, subset))
            if not samples:
                findings.problems.append(f"no image of `{subset.source}` can be read")
            kept, held_back = _split(samples, subset, findings)
            training += kept
            self.validation += [replace(sample, num_repeats=1) for sample in held_back]
        self.samples += _balance_regularisation(training, findings)

    def _lacks_mask(self, image: FoundImage, findings: Findings) -> bool:
        """Whether the mask cannot be read; one of another shape is a problem."""
        if image.mask_path is None:
            return False
        if image.mask_path not in self._measured:
            return True
        (width, height), (w, h) = self._measured[image.path].size, self._measured[image.mask_path].size
        if abs(width * h - height * w) > 0.01 * width * h:
            findings.problems.append(
                f"the mask `{image.mask_path}` ({w}x{h}) has another shape than "
                f"`{image.path}` ({width}x{height})"
            )
        return False

    def _sample(
        self, image: FoundImage, placement: Placement, number: int, dataset: Dataset, subset: Subset
    ) -> Sample:
        of_image = self._measured[image.path]
        text = image.caption
        if self._transforms:
            text = self._transforms(text, _caption_context(image, subset))
        caption = (text, subset.caption)
        if caption not in self._prompts:
            self._prompts[caption] = tuple(variants(*caption, self._caption_variants))
        return Sample(
            key=self._key(of_image.sha256, placement),
            image_path=image.path,
            image_hash=of_image.sha256,
            image_size=of_image.size,
            mask_path=image.mask_path,
            mask_hash=None if image.mask_path is None else self._measured[image.mask_path].sha256,
            placement=placement,
            caption=text,
            prompts=self._prompts[caption],
            num_repeats=subset.num_repeats,
            dataset_index=number,
            dataset=dataset,
            subset=subset,
        )

    def _key(self, sha256: str, placement: Placement) -> str:
        """Distinct for the same image in the same bucket twice: such samples must not share their noise."""
        what = f"{sha256} {placement.bucket} {placement.resized}"
        self._occurrences[what] += 1
        return hashlib.sha256(f"{what} {self._occurrences[what]}".encode()).hexdigest()[:32]


def _caption_context(image: FoundImage, subset: Subset) -> CaptionContext:
    return CaptionContext(image.path, subset.is_reg, subset.custom_attributes or {})


def _split(samples: list[Sample], subset: Subset, findings: Findings) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples of a subset, each in order.

    Which images are held back agrees with the reference tool: the last of a list shuffled by
    `validation_seed`. Regularisation images never are.
    """
    if subset.validation_split == 0 or subset.is_reg:
        return samples, []
    order = list(range(len(samples)))
    random.Random(subset.validation_seed).shuffle(order)
    num_held_back = round(len(samples) * subset.validation_split)
    if samples and not 0 < num_held_back < len(samples):
        findings.problems.append(
            f"`validation_split` {subset.validation_split:g} of the {len(samples)} images of "
            f"`{subset.source}` leaves {'none to validate' if num_held_back == 0 else 'none to train'}"
        )
    cut = len(samples) - num_held_back
    return [samples[i] for i in sorted(order[:cut])], [samples[i] for i in sorted(order[cut:])]


def _balance_regularisation(samples: list[Sample], findings: Findings) -> list[Sample]:
    """Repeats regularisation images until an epoch shows as many of them as of the others.

    As the reference tool counts: first each with its own repeats, until there are enough; then one more
    each, in turn. Images that are not reached are left out, and a note says how many.
    """
    others = [sample for sample in samples if not sample.subset.is_reg]
    regular = [sample for sample in samples if sample.subset.is_reg]
    if not regular:
        return samples
    wanted = sum(sample.num_repeats for sample in others)
    if wanted == 0:
        findings.problems.append("a dataset has regularisation images only (`is_reg`)")
        return samples
    used: list[Sample] = []
    total = 0
    for sample in regular:
        if total >= wanted:
            break
        used.append(sample)
        total += sample.num_repeats
    if len(used) < len(regular):
        findings.notes.append(
            f"{len(regular) - len(used)} of {len(regular)} regularisation images are not used: "
            f"the others fill only {wanted} turns an epoch"
        )
    rounds, rest = divmod(max(wanted - total, 0), len(used))
    extra = [rounds + (place < rest) for place in range(len(used))]
    return others + [
        replace(s, num_repeats=s.num_repeats + more) for s, more in zip(used, extra, strict=True)
    ]
