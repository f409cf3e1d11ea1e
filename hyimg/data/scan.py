"""Scanning: from a dataset file to its samples.

    found = scan(load_dataset_file(path), Index(cache_dir))
    found.samples        # to train on
    found.validation     # held out by `validation_split`
    found.skipped        # images that cannot be read, with on_bad_image="skip"
    found.warnings       # lines for the user

The index remembers content hash and size of each image file, so a warm scan reads none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from hyimg.cache.hashing import FileStat, hash_bytes
from hyimg.cache.index import Index
from hyimg.config.documents import read_bounded
from hyimg.data.buckets import Placement, Size
from hyimg.data.captions import CaptionContext, CaptionSettings, CaptionTransforms, variants
from hyimg.data.dataset_keys import Dataset, DatasetFile, Subset
from hyimg.data.files import FoundImage, find_images
from hyimg.data.findings import Finding, Findings, sample_findings, warning_lines
from hyimg.data.images import IMAGE_BYTES, probe
from hyimg.data.pixels import image_memory
from hyimg.data.samples import Sample, gc_disabled
from hyimg.errors import HyimgError, first_few, raise_system_limit

_MOST_THREADS = 8


Measured = tuple[str, Size]
"""Of a readable image: sha256 of its file, and (width, height) when upright."""


def measure(
    paths: Iterable[Path], index: Index, progress: Callable[[int], None] | None = None
) -> tuple[dict[Path, Measured], dict[Path, str]]:
    """Hashes and sizes of images, and why the others cannot be read.

    A file that the index knows is not opened. `progress` is called with the number of images done since the last call.
    """
    by_name = {_index_name(path): path for path in dict.fromkeys(paths)}
    measured: dict[Path, Measured] = {}
    for name, (stat, sha256, size) in index.images(list(by_name)).items():
        with contextlib.suppress(OSError):
            if FileStat.of(os.stat(by_name[name])) == stat:
                measured[by_name[name]] = (sha256, size)
    bad: dict[Path, str] = {}
    unknown = [path for path in by_name.values() if path not in measured]
    if progress is not None:
        progress(len(measured))
    # reading waits for the disk and decoding releases the interpreter lock
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for path, result in zip(unknown, pool.map(lambda path: _read(path, index), unknown), strict=True):
            if isinstance(result, str):
                bad[path] = result
            else:
                measured[path] = result
            if progress is not None:
                progress(1)
    return measured, bad


def _read(path: Path, index: Index) -> Measured | str:
    try:
        stat = FileStat.of(os.stat(path))
        with image_memory(path):
            data = read_bounded(path, IMAGE_BYTES)
            sha256 = hash_bytes(data)
            size = index.image_size(sha256)
            if size is None:
                size = probe(data)
                index.remember_image_size(sha256, size)
        # not remembered if it changed meanwhile, or may still change without a new mtime
        if stat.is_settled() and FileStat.of(os.stat(path)) == stat:
            index.remember_content_hash(_index_name(path), stat, sha256)
    except OSError as error:
        raise_system_limit(error)
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return sha256, size


def _index_name(path: Path) -> str:
    """The path as UTF-8 text; a name in another encoding (from an old archive, for example) is escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Scan:
    """The result of `scan`. `skipped` are images that cannot be read, with the reason; `findings` say per file what is
    skipped or assumed, `notes` the rest. `name` formats a path for a message."""

    samples: list[Sample]
    validation: list[Sample]
    skipped: list[tuple[Path, str]]
    notes: list[str]
    findings: list[Finding]
    name: Callable[[Path | str], str]

    @property
    def warnings(self) -> list[str]:
        """What every command that reads the dataset warns about: a line for each note and each kind of finding."""
        lines = [*self.notes, *warning_lines(self.findings, self.name)]
        if self.skipped:
            listed = first_few([f"{self.name(path)} ({why})" for path, why in self.skipped])
            lines.append(f"image that cannot be read, skipped ({len(self.skipped)}): {listed}")
        return lines


@gc_disabled()
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

    `caption_variants` is the number of variants of a caption with randomness, after `transforms`. `on_bad_image` is
    "error" or "skip", for images that cannot be read. `progress` is called with the number of images measured since
    the last call. Raises `HyimgError` that lists every folder, caption and image that is missing or broken.
    """
    index = index or Index(None)
    findings = Findings(dataset_file.path.parent, notes=dataset_file.notes)
    found = [_images_of(dataset_file, dataset, index.folder, findings) for dataset in dataset_file.datasets]
    _raise_problems(dataset_file, findings)

    images = [image for in_dataset in found for in_subset in in_dataset for image in in_subset]
    paths = [image.path for image in images] + [i.mask_path for i in images if i.mask_path is not None]
    measured, bad = measure(paths, index, progress)
    if on_bad_image == "error":
        for path, why in bad.items():
            findings.problem("cannot read the image", path, about=why)
        _raise_problems(dataset_file, findings)

    if transforms:
        captioned = (
            (image.caption, _caption_context(image, subset))
            for dataset, in_dataset in zip(dataset_file.datasets, found, strict=True)
            for subset, in_subset in zip(dataset.subsets, in_dataset, strict=True)
            for image in in_subset
        )
        transforms.check_pure(captioned)
    builder = _Builder(measured, caption_variants, transforms or CaptionTransforms(), findings)
    for number, (dataset, in_dataset) in enumerate(zip(dataset_file.datasets, found, strict=True)):
        builder.add_dataset(number, dataset, in_dataset)
    if not builder.samples and not findings.problems:
        findings.problem(
            "there is no image to train on: `validation_split = 1` takes every image for validation"
            if builder.validation
            else "there is no image to train on: every subset has `num_repeats = 0`"
        )
    _raise_problems(dataset_file, findings)
    samples = [*builder.samples, *builder.validation]
    findings.items += sample_findings(samples, index, transformed=bool(transforms))
    return Scan(
        builder.samples,
        builder.validation,
        list(bad.items()),
        findings.notes,
        list(dict.fromkeys(findings.items)),
        findings.name,
    )


def _images_of(
    dataset_file: DatasetFile, dataset: Dataset, cache_dir: Path | None, findings: Findings
) -> list[list[FoundImage]]:
    """The images of each subset of a dataset; the search of a folder skips folders that are subsets themselves."""
    every = [subset for one in dataset_file.datasets for subset in one.subsets]
    files = {
        path for subset in every for path in (subset.metadata_file, subset.conditioning_data_dir) if path
    }
    files |= {dataset_file.path.absolute()} | ({cache_dir.absolute()} if cache_dir is not None else set())
    found: list[list[FoundImage]] = []
    for subset in dataset.subsets:
        others = {
            other.image_dir
            for other in (dataset.subsets if subset.recursive else every)
            if other.image_dir is not None and other.metadata_file is None
        }
        ignored = (files | others) - {subset.image_dir}
        if subset.recursive and subset.image_dir is not None:
            for inner in sorted(other for other in others if subset.image_dir in other.parents):
                findings.notes.append(
                    f"the search of {findings.name(subset.image_dir)} skips {findings.name(inner)}, "
                    "which is a subset itself"
                )
        found.append(find_images(subset, findings, ignored=ignored))
    return found


def _raise_problems(dataset_file: DatasetFile, findings: Findings) -> None:
    problems = findings.problems
    if len(problems) == 1:
        raise HyimgError(problems[0], hint=f"the dataset file is `{dataset_file.path}`")
    if problems:
        raise HyimgError(
            f"the dataset of `{dataset_file.path}` has {len(problems)} problems:",
            details=findings.listing,
        )


class _Builder:
    """Makes samples from found and measured images."""

    def __init__(
        self,
        measured: dict[Path, Measured],
        caption_variants: int,
        transforms: CaptionTransforms,
        findings: Findings,
    ) -> None:
        self.samples: list[Sample] = []
        self.validation: list[Sample] = []
        self._measured = measured
        self._caption_variants = caption_variants
        self._transforms = transforms
        self._findings = findings
        self._prompts: dict[tuple[str, CaptionSettings], tuple[str, ...]] = {}
        self._occurrences: Counter[str] = Counter()

    def add_dataset(self, number: int, dataset: Dataset, found: Iterable[Sequence[FoundImage]]) -> None:
        placements: dict[Size, Placement] = {}
        training: list[Sample] = []
        for subset, images in zip(dataset.subsets, found, strict=True):
            samples: list[Sample] = []
            for image in images:
                if image.path not in self._measured or self._lacks_mask(image):
                    continue
                _, size = self._measured[image.path]
                if size not in placements:
                    placements[size] = dataset.bucket_sizes.place(size)
                samples.append(self._sample(image, placements[size], number, dataset, subset))
            if not samples:
                self._findings.problem("no image can be read from", subset.source)
            kept, held_out = _split(samples, subset, self._findings)
            training += kept
            self.validation += [replace(sample, num_repeats=1) for sample in held_out]
        self.samples += _balance_regularisation(training, self._findings)

    def _lacks_mask(self, image: FoundImage) -> bool:
        """Whether the mask cannot be read; a mask with another aspect ratio than the image is a problem."""
        if image.mask_path is None:
            return False
        if image.mask_path not in self._measured:
            return True
        (width, height), (w, h) = self._measured[image.path][1], self._measured[image.mask_path][1]
        if abs(width * h - height * w) > 0.01 * width * h:
            self._findings.problem(
                "the mask has another aspect ratio than its image:",
                image.mask_path,
                about=f"{w}x{h}, not {width}x{height}",
            )
        return False

    def _sample(
        self, image: FoundImage, placement: Placement, number: int, dataset: Dataset, subset: Subset
    ) -> Sample:
        sha256, size = self._measured[image.path]
        text = image.caption
        if self._transforms:
            text = subset.caption.clean(self._transforms(text, _caption_context(image, subset)))
        caption = (text, subset.caption)
        if caption not in self._prompts:
            self._prompts[caption] = tuple(variants(*caption, self._caption_variants))
        return Sample(
            key=self._key(sha256, placement),
            image_path=image.path,
            image_hash=sha256,
            image_size=size,
            mask_path=image.mask_path,
            mask_hash=None if image.mask_path is None else self._measured[image.mask_path][0],
            placement=placement,
            caption=text,
            prompts=self._prompts[caption],
            num_repeats=subset.num_repeats,
            dataset_index=number,
            dataset=dataset,
            subset=subset,
            caption_is_private=image.caption_is_private,
        )

    def _key(self, sha256: str, placement: Placement) -> str:
        """Distinct also if an image is in a bucket twice: these samples must not share their noise."""
        what = f"{sha256} {placement.bucket} {placement.resized}"
        self._occurrences[what] += 1
        return hashlib.sha256(f"{what} {self._occurrences[what]}".encode()).hexdigest()[:32]


def _caption_context(image: FoundImage, subset: Subset) -> CaptionContext:
    return CaptionContext(image.path, subset.is_reg, subset.custom_attributes or {})


def _split(samples: list[Sample], subset: Subset, findings: Findings) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples of a subset, each in order.

    The validation images are the last of a list shuffled by `validation_seed`, as in the reference tool.
    Regularisation images are never held out.
    """
    if subset.validation_split == 0 or subset.is_reg:
        return samples, []
    order = list(range(len(samples)))
    random.Random(subset.validation_seed).shuffle(order)
    num_held_out = round(len(samples) * subset.validation_split)
    if samples and subset.validation_split < 1 and not 0 < num_held_out < len(samples):
        left = "none to validate" if num_held_out == 0 else "none to train"
        findings.problem(
            f"`validation_split` {subset.validation_split:g} leaves {left} of",
            subset.source,
            about=f"{len(samples)} images",
        )
    cut = len(samples) - num_held_out
    return [samples[i] for i in sorted(order[:cut])], [samples[i] for i in sorted(order[cut:])]


def _balance_regularisation(samples: list[Sample], findings: Findings) -> list[Sample]:
    """Repeats regularisation images until an epoch has as many of them as of the others.

    As in the reference tool: first each with its own repeats, until there are enough; then one more repeat each, in
    turn. Images that are not needed are dropped, and a note says how many.
    """
    others = [sample for sample in samples if not sample.subset.is_reg]
    regular = [sample for sample in samples if sample.subset.is_reg]
    if not regular:
        return samples
    wanted = sum(sample.num_repeats for sample in others)
    if wanted == 0:
        findings.problem("a dataset trains on regularisation images only (`is_reg`)")
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
            f"an epoch has only {wanted} other images (with repeats)"
        )
    rounds, rest = divmod(max(wanted - total, 0), len(used))
    extra = [rounds + (place < rest) for place in range(len(used))]
    return others + [
        replace(s, num_repeats=s.num_repeats + more) for s, more in zip(used, extra, strict=True)
    ]
