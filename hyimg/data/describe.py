"""A dataset as the metadata of a LoRA file tells it, in the reference tool's words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hyimg.data.dataset import DatasetFile, Subset
from hyimg.data.sample import Sample


def describe_datasets(dataset_file: DatasetFile, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One dictionary a dataset: size, buckets, subsets, and how often each tag stands in a folder's captions."""
    return [_describe(dataset_file, number, samples) for number in range(len(dataset_file.datasets))]


def _describe(dataset_file: DatasetFile, number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    dataset = dataset_file.datasets[number]
    own = [sample for sample in samples if sample.dataset_index == number]
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
        "tag_frequency": {folder: dict(counts) for folder, counts in frequency.items()},
        "bucket_info": {
            "buckets": {
                str(i): {"resolution": list(size), "count": count}
                for i, (size, count) in enumerate(sorted(buckets.items()))
            }
        },
        "subsets": [_describe_subset(subset, own) for subset in dataset.subsets],
    }


def _describe_subset(subset: Subset, samples: Sequence[Sample]) -> dict[str, Any]:
    # only names of folders: a LoRA file goes out into the world, and whole paths tell who made it
    return {
        "img_count": sum(1 for sample in samples if sample.subset is subset),
        "num_repeats": subset.num_repeats,
        "image_dir": subset.image_dir.name if subset.image_dir is not None else None,
        "metadata_file": subset.metadata_file.name if subset.metadata_file is not None else None,
        "class_tokens": subset.class_tokens,
        "is_reg": subset.is_reg,
    }
