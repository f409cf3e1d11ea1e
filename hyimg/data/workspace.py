"""A dataset file with its images and caches: what every stage that reads a dataset opens first."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.index import Index
from hyimg.cache.own_files import is_link
from hyimg.config.dataset_options import DatasetFileOptions, DatasetOptions
from hyimg.data.captions import CaptionTransforms
from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.dataset_keys import DatasetFile
from hyimg.data.samples import Sample
from hyimg.data.scan import Scan, scan
from hyimg.errors import HyimgError
from hyimg.report import Reporter

CACHE_FOLDER = "hyimg-cache"


@dataclass(frozen=True)
class Workspace:
    """A dataset and its caches. With the index, a warm start reads no image."""

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
    def has_random_captions(self) -> bool:
        """Whether `--caption_variants` has an effect on a caption."""
        return any(
            len(sample.prompts) > 1
            or sample.subset.caption.shuffle_caption
            or sample.subset.caption.enable_wildcard
            or sample.subset.caption.caption_tag_dropout_rate > 0
            for sample in self.all_samples
        )

    @property
    def all_samples(self) -> list[Sample]:
        """The samples to train on and those held out for validation: all that are cached."""
        return self.found.samples + self.found.validation


def cache_folder(cache_dir: Path | None, dataset_config: Path) -> Path:
    """`--cache_dir`, or `hyimg-cache` next to the dataset file.

    Raises HyimgError if the latter is a link: it may have come with the dataset, and only links that the user gives are
    followed.
    """
    if cache_dir is not None:
        return cache_dir
    folder = dataset_config.absolute().parent / CACHE_FOLDER
    if is_link(folder):
        raise HyimgError(
            f"`{folder}` is a link, which is only followed if given as `--cache_dir`",
            hint=f"give `--cache_dir {shlex.quote(os.path.realpath(folder))}`, or remove the link",
        )
    return folder


def open_workspace(
    options: DatasetFileOptions,
    report: Reporter,
    *,
    transforms: CaptionTransforms | None = None,
    **defaults: object,
) -> Workspace:
    """Reads the dataset file and finds its images; warns about what is skipped or assumed.

    Captions go through `transforms`. `defaults` are values from flags for dataset keys that the file does not set
    (`batch_size`). Raises HyimgError for everything that is wrong with the file or its images.
    """
    given = {key: value for key, value in defaults.items() if value is not None}
    dataset_file = load_dataset_file(options.dataset_config, defaults=given)
    cache_dir = cache_folder(options.cache_dir, options.dataset_config)
    index = Index(cache_dir)
    found = scan(
        dataset_file,
        index,
        caption_variants=_caption_variants(options),
        transforms=transforms,
        on_bad_image=options.on_bad_image,
    )
    if index.was_damaged:
        report.warning(
            f"the index in `{cache_dir}` was damaged and is rebuilt: all images and entries are read again"
        )
    for line in found.warnings:
        report.warning(line)
    return Workspace(dataset_file, found, cache_dir, index)


def _caption_variants(options: DatasetFileOptions) -> int:
    """`--caption_variants`; one for commands without the option."""
    return options.caption_variants if isinstance(options, DatasetOptions) else 1


# Option -> the dataset key that it is the default of, and two values of it
_FLAGS_FOR_KEYS: Mapping[str, tuple[str, object, object]] = {
    "train_batch_size": ("batch_size", 1, 2),
    "prior_loss_weight": ("prior_loss_weight", 0.25, 0.5),
    "validation_split": ("validation_split", 0.25, 0.5),
}


def options_left_to_flags(dataset_config: Path) -> list[str]:
    """The options whose value is used because the dataset file does not set the key everywhere.

    If two values of an option give the same dataset, the file sets the key.
    """
    return [
        option
        for option, (key, one, other) in _FLAGS_FOR_KEYS.items()
        if load_dataset_file(dataset_config, {key: one}).datasets
        != load_dataset_file(dataset_config, {key: other}).datasets
    ]


def samples_for(
    dataset_config: Path,
    options: DatasetFileOptions,
    index: Index,
    transforms: CaptionTransforms | None = None,
) -> list[Sample]:
    """The samples of another dataset file that uses the same cache, including those for validation.

    Its captions go through the same `transforms`. An unreadable image is an error whatever `--on_bad_image` is, since
    its entries are unknown and could not be kept.
    """
    found = scan(
        load_dataset_file(dataset_config),
        index,
        caption_variants=_caption_variants(options),
        transforms=transforms,
    )
    return found.samples + found.validation
