"""A dataset as the metadata of a LoRA file tells it, in the reference tool's words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hyimg.data.dataset import DatasetFile, Subset
from hyimg.data.sample import Sample

_CAPTION_KEYS = (
    *("shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator", "enable_wildcard"),
    *("caption_prefix", "caption_suffix", "caption_tag_dropout_rate"),
)


def describe_datasets(dataset_file: DatasetFile, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One dictionary a dataset: size, buckets, subsets, and how often each tag stands in a folder's captions."""
    return [_describe(dataset_file, number, samples) for number in range(len(dataset_file.datasets))]


def dataset_dirs(datasets: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Of described datasets, how many images each folder has and how often they are shown; no regularisation.

    A name that comes again is told apart by a number.
    """
    dirs: dict[str, dict[str, int]] = {}
    for subset in (subset for dataset in datasets for subset in dataset["subsets"] if not subset["is_reg"]):
        source = name = subset["metadata_file"] or subset["image_dir"]
        number = 1
        while name in dirs:
            number += 1
            name = f"{source} ({number})"
        dirs[name] = {"n_repeats": subset["num_repeats"], "img_count": subset["img_count"]}
    return dirs


def _describe(dataset_file: DatasetFile, number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    dataset = dataset_file.datasets[number]
    own = [sample for sample in samples if sample.dataset_index == number]
    sizes = dataset.bucket_sizes
    buckets = Counter(sample.bucket for sample in own for _ in range(sample.num_repeats))
    frequency: dict[str, Counter[str]] = {}
    for sample in own:
        tags = (
            tag.strip()
            for tag in sample.caption.split(sample.subset.caption.caption_separator.strip() or ",")
        )
        frequency.setdefault(sample.subset.source.name, Counter()).update(tag for tag in tags if tag)
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(s.num_repeats for s in own if not s.subset.is_reg),
        "num_reg_images": sum(s.num_repeats for s in own if s.subset.is_reg),
        "resolution": list(dataset.resolution),
        "enable_bucket": sizes.steps is not None,
        "min_bucket_reso": sizes.min_reso,
        "max_bucket_reso": sizes.max_reso,
        "tag_frequency": {folder: dict(counts) for folder, counts in frequency.items()},
        "bucket_info": {
            "buckets": {
                str(i): {"resolution": list(size), "count": count}
                for i, (size, count) in enumerate(sorted(buckets.items()))
            },
            "mean_img_ar_error": fmean(map(_aspect_error, own)) if own else 0.0,
        },
        "subsets": [_describe_subset(subset, own) for subset in dataset.subsets],
    }


def _aspect_error(sample: Sample) -> float:
    """How far width / height of the bucket is from that of the image."""
    (width, height), (own_width, own_height) = sample.bucket, sample.image_size
    return abs(width / height - own_width / own_height)


def _describe_subset(subset: Subset, samples: Sequence[Sample]) -> dict[str, Any]:
    # only names of folders: a LoRA file goes out into the world, and whole paths tell who made it
    return {
        "img_count": sum(1 for sample in samples if sample.subset is subset),
        "num_repeats": subset.num_repeats,
        "flip_aug": subset.flip_aug,
        # what latents in a cache do not have
        **dict.fromkeys(("color_aug", "random_crop"), False),
        **{name: getattr(subset.caption, name) for name in _CAPTION_KEYS},
        "caption_dropout_rate": subset.caption_dropout_rate,
        "caption_dropout_every_n_epochs": subset.caption_dropout_every_n_epochs,
        "resize_interpolation": subset.resize_interpolation,
        "image_dir": subset.image_dir.name if subset.image_dir is not None else None,
        "metadata_file": subset.metadata_file.name if subset.metadata_file is not None else None,
        "class_tokens": subset.class_tokens,
        "is_reg": subset.is_reg,
    }
