"""What a dataset file says, as frozen values: datasets, their subsets, and how captions are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hyimg.data.buckets import BucketSizes, Size
from hyimg.data.captions import CaptionSettings

DEFAULT_CAPTION_EXTENSIONS = (".txt", ".caption")


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One `[[datasets.subsets]]` table with all defaults filled in; fields are keys of the file.

    Paths are absolute. Either `metadata_file` lists the images (relative ones are under `image_dir`), or
    they are the files of `image_dir`.
    """

    image_dir: Path | None = None
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    is_reg: bool = False
    num_repeats: int = 1
    caption_extensions: tuple[str, ...] = DEFAULT_CAPTION_EXTENSIONS
    class_tokens: str | None = None
    caption: CaptionSettings = CaptionSettings()  # noqa: RUF009 (frozen)
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    flip_aug: bool = False
    alpha_mask: bool = False
    validation_split: float = 0.0
    validation_seed: int = 0
    resize_interpolation: str | None = None
    custom_attributes: Mapping[str, object] | None = None

    @property
    def source(self) -> Path:
        """The folder or metadata file that the subset is."""
        source = self.metadata_file or self.image_dir
        assert source is not None
        return source


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One `[[datasets]]` table with all defaults filled in."""

    resolution: Size
    batch_size: int = 1
    bucket_sizes: BucketSizes
    network_multiplier: float = 1.0
    prior_loss_weight: float = 1.0
    subsets: tuple[Subset, ...] = ()


@dataclass(frozen=True)
class DatasetFile:
    """A read dataset file. `notes` are sentences for the user about what it asks for."""

    path: Path
    datasets: tuple[Dataset, ...]
    notes: tuple[str, ...] = ()
