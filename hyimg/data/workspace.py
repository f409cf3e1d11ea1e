"""What every stage that reads a dataset file opens first: the file, its images, and the caches beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.index import Index
from hyimg.config.dataset import DatasetOptions
from hyimg.data.caption_transforms import CaptionTransforms
from hyimg.data.dataset import DatasetFile
from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.sample import Sample
from hyimg.data.samples import Scan, scan
from hyimg.report import Reporter

CACHE_FOLDER = "hyimg-cache"


@dataclass(frozen=True)
class Workspace:
    """A dataset and its caches. `index` remembers what was read, so that a warm start reads no image."""

    dataset_file: DatasetFile
    found: Scan
    cache_dir: Path
    index: Index

    @property
    def latents_dir(self) -> Path:
        return self.cache_dir / "latents"

    @property
    def text_dir(self) -> Path:
        return self.cache_dir / "text"

    @property
    def all_samples(self) -> list[Sample]:
        """Those to train on and those held back for validation: what is cached."""
        return self.found.samples + self.found.validation


def cache_folder(cache_dir: Path | None, dataset_config: Path) -> Path:
    """`--cache_dir`, or `hyimg-cache` beside the dataset file."""
    return cache_dir if cache_dir is not None else dataset_config.absolute().parent / CACHE_FOLDER


def open_workspace(
    options: DatasetOptions,
    report: Reporter,
    *,
    transforms: CaptionTransforms | None = None,
    **defaults: object,
) -> Workspace:
    """Reads the dataset file and finds its images; notes and skipped images are reported.

    Captions pass through `transforms`. `defaults` are dataset keys that flags give for what the file leaves out
    (`batch_size`). Raises HyimgError for everything that is wrong with the file or its images.
    """
    assert options.dataset_config is not None
    given = {key: value for key, value in defaults.items() if value is not None}
    dataset_file = load_dataset_file(options.dataset_config, defaults=given)
    cache_dir = cache_folder(options.cache_dir, options.dataset_config)
    index = Index(cache_dir)
    found = scan(
        dataset_file,
        index,
        caption_variants=options.caption_variants,
        transforms=transforms,
        on_bad_image=options.on_bad_image,
    )
    if index.was_damaged:
        report.warning(
            f"the index in `{cache_dir}` was damaged and is made anew: images and entries are read once"
        )
    for note in found.notes:
        report.warning(note)
    for path, reason in found.skipped:
        report.warning(f"left out `{path}`: {reason}")
    return Workspace(dataset_file, found, cache_dir, index)


def samples_for(
    dataset_config: Path,
    options: DatasetOptions,
    index: Index,
    transforms: CaptionTransforms | None = None,
) -> list[Sample]:
    """The samples of another dataset file that uses the same cache, those for validation included.

    Its captions pass through the same `transforms`. A bad image is an error whatever `--on_bad_image` says: what
    is not known cannot be kept.
    """
    found = scan(
        load_dataset_file(dataset_config),
        index,
        caption_variants=options.caption_variants,
        transforms=transforms,
    )
    return found.samples + found.validation
