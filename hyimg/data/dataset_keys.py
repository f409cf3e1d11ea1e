"""What a dataset file says, as frozen values, and every key that it may hold.

A key is a field of `Dataset`, `Subset` or `CaptionSettings`, or of the two groups of keys below, declared with its
bounds, default and meaning; `hyimg.data.dataset_file` reads a file by these declarations. Names, levels and defaults
are the reference tool's unless the declaration says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hyimg.config.option import REQUIRED, Option, option, options_of
from hyimg.config.values import check_value
from hyimg.data.buckets import SIZE_MULTIPLE, BucketSizes, Size
from hyimg.data.captions import CaptionSettings

DEFAULT_CAPTION_EXTENSIONS = (".txt", ".caption")
MAX_SIDE = 16384
"""Pixels; well above what the model was trained on, and below sizes that only a typing error makes."""

_SIDE = Option(name="side", help="", kind="int", minimum=1, maximum=MAX_SIDE, multiple_of=SIZE_MULTIPLE)


def _resolution(raw: object) -> Size:
    sides = raw if isinstance(raw, (list, tuple)) else [raw, raw]
    if len(sides) != 2:
        raise ValueError(f"must be a whole number or [width, height], got {len(sides)} values")
    width, height = (check_value(_SIDE, side, typed=True) for side in sides)
    return width, height


def _multiplier(raw: object) -> float:
    number: float = check_value(Option(name="", help="", kind="float"), raw, typed=True)
    if number == 0:
        raise ValueError("must not be 0, which trains nothing")
    return number


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One `[[datasets.subsets]]` table with all defaults filled in.

    Paths are absolute. Either `metadata_file` lists the images (relative ones are under `image_dir`, or else next to
    it), or they are the files of `image_dir`.
    """

    image_dir: Path | None = option(None, help="folder of images")
    recursive: bool = option(False, help="include the images of its subfolders")
    metadata_file: Path | None = option(None, help="JSON or JSON lines of images and captions")
    conditioning_data_dir: Path | None = option(None, help="folder of loss masks, named as the images")
    is_reg: bool = option(False, help="regularisation images, repeated to the number of the others")
    num_repeats: int = option(1, minimum=0, help="times an epoch shows each image; 0 is never")
    caption_extension: str | None = option(
        None,
        minimum=1,
        help="ending of caption files (not given: .txt, then .caption)",
        reference_default=".caption",
        differs="`.txt` first, then `.caption`",
    )
    class_tokens: str | None = option(None, help="caption of images that have none")
    caption: CaptionSettings = CaptionSettings()  # noqa: RUF009 (frozen)
    caption_dropout_rate: float = option(
        0.0, minimum=0, maximum=1, help="how often the caption is dropped, 0..1"
    )
    caption_dropout_every_n_epochs: int = option(0, minimum=0, help="no captions every nth epoch")
    flip_aug: bool = option(False, help="show images mirrored half of the time (both are cached)")
    alpha_mask: bool = option(False, help="weight the loss by the image's alpha channel")
    validation_split: float = option(
        0.0, minimum=0, maximum=1, help="share of the images held out for validation, 0..1 (1: all)"
    )
    validation_seed: int = option(0, minimum=0, help="which images these are")
    resize_interpolation: str | None = option(
        None,
        choices=("lanczos", "bicubic", "bilinear", "area", "nearest"),
        synonyms={"lanczos4": "lanczos", "cubic": "bicubic", "linear": "bilinear", "box": "area"},
        help="resize filter (not given: area to shrink, else lanczos)",
    )
    custom_attributes: Mapping[str, object] | None = option(None, help="anything, passed on with each image")

    @property
    def caption_extensions(self) -> tuple[str, ...]:
        """The endings of caption files, first choice first."""
        return DEFAULT_CAPTION_EXTENSIONS if self.caption_extension is None else (self.caption_extension,)

    @property
    def image_root(self) -> Path:
        """Where relative paths of images start."""
        return self.image_dir or self.source.parent

    @property
    def source(self) -> Path:
        """The folder or metadata file that the subset is."""
        source = self.metadata_file or self.image_dir
        assert source is not None
        return source


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One `[[datasets]]` table with all defaults filled in."""

    resolution: Size = option(
        REQUIRED, convert=_resolution, help="a side, or [width, height]; multiples of 32"
    )
    batch_size: int = option(1, minimum=1, help="images a batch, all of one bucket")
    bucket_sizes: BucketSizes
    network_multiplier: float = option(
        1.0, convert=_multiplier, help="strength of the LoRA while training on this dataset"
    )
    prior_loss_weight: float = option(1.0, minimum=0, help="loss weight of regularisation images")
    subsets: tuple[Subset, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BucketKeys:
    """Keys that `Dataset.bucket_sizes` is made of."""

    enable_bucket: bool = option(
        False, help="keep aspect ratios, at about one area if `max_bucket_reso` allows"
    )
    min_bucket_reso: int | None = option(
        None,
        minimum=1,
        maximum=MAX_SIDE,
        help="shortest side (not given: 256, or half the resolution)",
        reference_default=256,
        differs="256, or half the resolution if that is less",
    )
    max_bucket_reso: int | None = option(
        None,
        minimum=1,
        maximum=MAX_SIDE,
        help="longest side (not given: 1024, or the resolution)",
        reference_default=1024,
        differs="1024, or the resolution if that is more",
    )
    bucket_reso_steps: int = option(
        32,
        minimum=1,
        maximum=MAX_SIDE,
        multiple_of=SIZE_MULTIPLE,
        help="step of bucket sizes; a multiple of 32",
        reference_default=64,
        differs="the model's pixels come in blocks of 32",
    )
    bucket_no_upscale: bool = option(False, help="buckets follow the images, which are never enlarged")


@dataclass(frozen=True, kw_only=True)
class UnusedKeys:
    """Keys of the reference tool that change nothing here, or are not supported."""

    cache_info: bool = option(False, help="remember image sizes (always done)")
    token_warmup_min: int = option(1, minimum=0, help="see token_warmup_step")
    token_warmup_step: float = option(0.0, minimum=0, help="not supported")
    color_aug: bool = option(False, help="not supported")
    random_crop: bool = option(False, help="not supported")
    face_crop_aug_range: tuple[float, ...] | None = option(None, count=2, help="not supported")


_FROM_ONE_IMAGE = (
    "latents are cached from one fixed view of each image, and this changes the image at each step"
)
UNSUPPORTED_KEYS = {
    "token_warmup_step": "text is cached, and this makes captions depend on the training step",
    **dict.fromkeys(("color_aug", "random_crop", "face_crop_aug_range"), _FROM_ONE_IMAGE),
}
"""Keys of which only the default is accepted, with the reason."""

OWN_KEYS = frozenset(("image_dir", "metadata_file", "conditioning_data_dir", "is_reg"))
"""Keys of a subset that may not be in an outer table."""

Level = Literal["dataset", "subset"]
_GROUPS: Mapping[Level, tuple[type, ...]] = {
    "dataset": (Dataset, BucketKeys),
    "subset": (Subset, CaptionSettings, UnusedKeys),
}
LEVEL_KEYS: Mapping[Level, Mapping[str, Option]] = {
    level: {key.name: key for group in groups for key in options_of(group)}
    for level, groups in _GROUPS.items()
}
"""The keys about a dataset and those about a subset. Those of a subset may be in outer tables, except `OWN_KEYS`."""
KEYS: Mapping[str, Option] = {**LEVEL_KEYS["dataset"], **LEVEL_KEYS["subset"]}


def fields_given(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are keys of a group."""
    return {key.name: values[key.name] for key in options_of(group) if key.name in values}


@dataclass(frozen=True)
class DatasetFile:
    """A dataset file that was read. `notes` are sentences for the user about what it asks for."""

    path: Path
    datasets: tuple[Dataset, ...]
    notes: tuple[str, ...] = ()
