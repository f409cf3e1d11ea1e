"""The metadata of a saved LoRA: the reference tool's `ss_*` keys, and modelspec.

Values are strings, as safetensors requires; keys without a meaning here are `None`, as the reference tool writes
them. modelspec: https://github.com/Stability-AI/ModelSpec, version 1.0.1.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from torch.optim import Optimizer

from hyimg import __version__
from hyimg.cache.hashing import FileStat, Memo
from hyimg.checkpoints.safetensors_file import MAX_HEADER_BYTES
from hyimg.config.commands import TrainConfig
from hyimg.config.load import flatten
from hyimg.data.buckets import Size
from hyimg.data.dataset_keys import Dataset, DatasetFile, Subset
from hyimg.data.samples import Sample
from hyimg.errors import HyimgError
from hyimg.plugins.arguments import parse_arguments
from hyimg.randomness import keyed_seed
from hyimg.report import Reporter, size_text
from hyimg.training.optimizers import base_of
from hyimg.training.steps import Schedule

_WINDOW_START, _WINDOW_BYTES = 0x100000, 0x10000


def model_hashes(path: Path | None, memo: Memo) -> tuple[str | None, str | None]:
    """(old, new): 8 hexadecimal digits of the sha256 of 64 KiB from 1 MiB on, and the file's sha256.

    The second only if `memo` knows it, since reading 35 GB takes a minute. Both are None for a folder or no file.
    """
    if path is None or not path.is_file():
        return None, None
    with path.open("rb") as file:
        file.seek(_WINDOW_START)
        window = file.read(_WINDOW_BYTES)
    known = memo.content_hash(os.path.abspath(path), FileStat.of(os.stat(path)))
    return hashlib.sha256(window).hexdigest()[:8], known


_CAPTION_KEYS = (
    *("shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator", "enable_wildcard"),
    *("caption_prefix", "caption_suffix", "caption_tag_dropout_rate", "multiline_caption"),
)


def describe_datasets(dataset_file: DatasetFile, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One dictionary a dataset: size, buckets and subsets."""
    by_dataset: list[list[Sample]] = [[] for _ in dataset_file.datasets]
    for sample in samples:
        by_dataset[sample.dataset_index].append(sample)
    return [_describe(of, own) for of, own in zip(dataset_file.datasets, by_dataset, strict=True)]


def tag_frequency(samples: Sequence[Sample]) -> dict[str, Counter[str]]:
    """The number of captions with each tag, by folder. A folder of several datasets counts once, in the first.

    Captions behind links that lead out of the dataset's folder are excluded.
    """
    frequency: dict[str, Counter[str]] = {}
    dataset_of: dict[str, int] = {}
    for sample in samples:
        folder = sample.subset.source.name
        if sample.caption_is_private:
            continue
        if dataset_of.setdefault(folder, sample.dataset_index) == sample.dataset_index:
            tags = (tag.strip() for tag in _tags(sample))
            frequency.setdefault(folder, Counter()).update(tag for tag in tags if tag)
    return frequency


def most_frequent_tags(
    frequency: Mapping[str, Mapping[str, int]], max_bytes: int
) -> tuple[dict[str, dict[str, int]], int]:
    """The most frequent tags that fit in `max_bytes` as JSON, and the number of dropped ones.

    Folders and tags keep their order; if not all folders fit, those without a fitting tag are dropped.
    """
    entries = [
        (count, folder, tag, json_bytes(tag) + len(str(count)) + 4)
        for folder, counts in frequency.items()
        for tag, count in counts.items()
    ]
    free = max_bytes - sum(json_bytes(folder) + 6 for folder in frequency)
    of_all_folders = free >= 0
    kept: dict[str, set[str]] = {folder: set() for folder in frequency if of_all_folders}
    free = free if of_all_folders else max_bytes
    for _, folder, tag, size in sorted(entries, key=lambda entry: -entry[0]):
        size += 0 if folder in kept else json_bytes(folder) + 6
        if size <= free:
            free -= size
            kept.setdefault(folder, set()).add(tag)
    found = {
        folder: {tag: count for tag, count in counts.items() if tag in kept[folder]}
        for folder, counts in frequency.items()
        if folder in kept
    }
    return found, len(entries) - sum(map(len, found.values()))


def fitting_subsets(
    datasets: Sequence[Mapping[str, Any]], max_bytes: int
) -> tuple[list[dict[str, Any]], int]:
    """Described datasets with the subsets, in order, that fit in `max_bytes` as JSON, and the number of dropped ones.

    A dataset that does not fit on its own is dropped.
    """
    free, num_dropped = max_bytes, 0
    kept: list[dict[str, Any]] = []
    for dataset in datasets:
        free -= json_bytes({**dataset, "subsets": []}) + 2
        fit = []
        for subset in dataset["subsets"]:
            free -= json_bytes(subset) + 2
            if free >= 0:
                fit.append(subset)
        num_dropped += len(dataset["subsets"]) - len(fit)
        if fit or free >= 0:
            kept.append({**dataset, "subsets": fit})
    return kept, num_dropped


def json_bytes(value: object) -> int:
    """How many bytes a value takes as JSON in UTF-8."""
    return len(json.dumps(value, ensure_ascii=False).encode())


def dataset_dirs(datasets: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The number of images and repeats by folder, without regularisation images. Repeated names get a number."""
    dirs: dict[str, dict[str, int]] = {}
    for subset in (subset for dataset in datasets for subset in dataset["subsets"] if not subset["is_reg"]):
        source = name = subset["metadata_file"] or subset["image_dir"]
        number = 1
        while name in dirs:
            number += 1
            name = f"{source} ({number})"
        dirs[name] = {"n_repeats": subset["num_repeats"], "img_count": subset["img_count"]}
    return dirs


def _describe(dataset: Dataset, own: Sequence[Sample]) -> dict[str, Any]:
    sizes = dataset.bucket_sizes
    buckets: Counter[Size] = Counter()
    num_images: Counter[int] = Counter()
    for sample in own:
        buckets[sample.bucket] += sample.num_repeats
        num_images[id(sample.subset)] += 1
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(s.num_repeats for s in own if not s.subset.is_reg),
        "num_reg_images": sum(s.num_repeats for s in own if s.subset.is_reg),
        "resolution": list(dataset.resolution),
        "enable_bucket": sizes.steps is not None,
        "min_bucket_reso": sizes.min_reso,
        "max_bucket_reso": sizes.max_reso,
        "bucket_info": {
            "buckets": {
                str(i): {"resolution": list(size), "count": count}
                for i, (size, count) in enumerate(sorted(buckets.items()))
            },
            "mean_img_ar_error": fmean(map(_aspect_error, own)) if own else 0.0,
        },
        "subsets": [_describe_subset(subset, num_images[id(subset)]) for subset in dataset.subsets],
    }


def _tags(sample: Sample) -> list[str]:
    """The tags of all lines of a caption that are trained."""
    settings = sample.subset.caption
    lines = sample.caption.split("\n")
    trained = lines[: len(lines) - settings.num_dropped_lines(sample.caption)]
    return [tag for line in trained for tag in line.split(settings.caption_separator.strip() or ",")]


def _aspect_error(sample: Sample) -> float:
    """The difference between the aspect ratios (width / height) of bucket and image."""
    (width, height), (own_width, own_height) = sample.bucket, sample.image_size
    return abs(width / height - own_width / own_height)


def _describe_subset(subset: Subset, num_images: int) -> dict[str, Any]:
    # only folder names: LoRA files are published, and full paths reveal who made them
    return {
        "img_count": num_images,
        "num_repeats": subset.num_repeats,
        "flip_aug": subset.flip_aug,
        # not possible with cached latents
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


BASE_MODEL = "hunyuan-image-2.1"
MAX_TAG_BYTES = 2_000_000
"""The maximum size of `ss_tag_frequency`: programs that list LoRA files read all headers."""
MAX_DATASETS_BYTES = 2_000_000
"""The maximum size of `ss_datasets`; `ss_dataset_dirs` lists the folders of the same subsets."""
_TENSOR_ENTRIES_BYTES = 10_000_000
"""Reserved in a header for the tensors' entries: 1000 tensors take 150 kB."""

# The reference tool's name of the built-in network, which programs look for
_NETWORK_MODULES = {"lora": "networks.lora_hunyuan_image"}
# Arguments that the reference tool always passes, and so always writes
_ALWAYS_PASSED = {"SGD": "momentum", "Adafactor": "relative_step"}

# Options written as `ss_` and their name
_OPTIONS = (
    "learning_rate",
    "unet_lr",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "scale_weight_norms",
    "ema_decay",
    "mixed_precision",
    "max_grad_norm",
    "optimizer_schedulefree_wrapper",
    "full_fp16",
    "full_bf16",
    "lr_warmup_steps",
    "validation_seed",
    "validation_split",
    "validate_every_n_steps",
    "validate_every_n_epochs",
    "max_validation_steps",
    "timestep_sampling",
    "sigmoid_scale",
    "discrete_flow_shift",
    "model_prediction_type",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "loss_type",
    "huber_schedule",
    "huber_c",
    "huber_scale",
    "prior_loss_weight",
    "training_comment",
    "output_name",
)

# Keys of the reference tool for its other models
_NOT_HERE: dict[str, Any] = {
    **dict.fromkeys(
        ("v2", "lowram", "zero_terminal_snr", "debiased_estimation", "fp8_base", "fp8_base_unet"), False
    ),
    **dict.fromkeys(
        ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "min_snr_gamma")
    ),
    **dict.fromkeys(("multires_noise_iterations", "multires_noise_discount", "text_encoder_lr")),
    **dict.fromkeys(("clip_skip", "max_token_length", "face_crop_aug_range")),
}
# Keys of subsets that are also written for the run if all subsets agree
_OF_ALL_SUBSETS = (
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
    "resize_interpolation",
)

# Options written to the modelspec, there without their prefix
_MODELSPEC_OPTIONS = (
    *("author", "description", "license", "tags", "usage_hint", "trigger_phrase", "merged_from"),
)


def fixed_metadata(
    config: TrainConfig,
    samples: Sequence[Sample],
    dataset: Sequence[Mapping[str, Any]],
    report: Reporter,
    *,
    num_validation_images: int,
    hashes: Mapping[str, str | None],
) -> dict[str, str]:
    """The metadata known before the first step; empty with `--no_metadata`.

    `dataset` comes from `describe_datasets`, `hashes` from `hash_metadata`. Tags and subsets beyond `MAX_TAG_BYTES`
    and `MAX_DATASETS_BYTES` are dropped, which is reported.

    Raises HyimgError for options that are too long for a safetensors header.
    """
    options = flatten(config)
    if options["no_metadata"]:
        return {}
    frequency = tag_frequency(samples)
    tags, num_dropped = most_frequent_tags(frequency, MAX_TAG_BYTES)
    listed, num_unlisted = fitting_subsets(dataset, MAX_DATASETS_BYTES)
    dropped = []
    if num_dropped:
        num_tags = sum(map(len, frequency.values()))
        dropped.append(
            f"`ss_tag_frequency` has room for {num_tags - num_dropped} of the {num_tags} "
            f"tags in the captions, the most frequent ones ({size_text(MAX_TAG_BYTES)} at most)"
        )
    if num_unlisted:
        num_subsets = sum(len(of["subsets"]) for of in dataset)
        dropped.append(
            f"`ss_datasets` and `ss_dataset_dirs` have room for the first {num_subsets - num_unlisted} of the "
            f"{num_subsets} subsets ({size_text(MAX_DATASETS_BYTES)} at most)"
        )
    if dropped:
        report.note(f"metadata of the LoRA files: {'; '.join(dropped)}")
    values: dict[str, Any] = {f"ss_{name}": value for name, value in _NOT_HERE.items()}
    values |= {f"ss_{name}": options[name] for name in _OPTIONS}
    values |= {f"ss_{name}": _of_all_subsets(dataset, name) for name in _OF_ALL_SUBSETS}
    if options["dim_from_weights"]:  # as the reference tool's scripts write it if ranks differ
        values |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    module: str = options["network_module"]
    values |= {
        "ss_network_module": _NETWORK_MODULES.get(module, module),
        "ss_base_model_version": BASE_MODEL,
        "ss_sd_model_name": options["dit"].name,
        **hashes,
        "ss_num_train_images": sum(s.num_repeats for s in samples if not s.subset.is_reg),
        "ss_num_validation_images": num_validation_images,
        "ss_num_reg_images": sum(s.num_repeats for s in samples if s.subset.is_reg),
        "ss_cache_latents": True,
        "ss_datasets": _json(listed),
        "ss_dataset_dirs": _json(dataset_dirs(listed)),
        "ss_tag_frequency": _json(tags),
        "ss_hyimg_version": __version__,
    }
    # As in the reference tool, these keys are written only with a value
    if options["network_args"]:
        pairs = [pair.partition("=") for pair in options["network_args"]]
        values["ss_network_args"] = _json({name.strip(): value for name, _, value in pairs})
    for name in ("vae", "text_encoder", "byt5"):
        if options[name]:
            values[f"ss_{name}_name"] = options[name].name
    fixed = {key: str(value) for key, value in values.items()} | _modelspec(options, dataset)
    _require_room(fixed)
    return fixed


def training_metadata(
    fixed: Mapping[str, str],
    *,
    seed: int,
    started: float,
    optimizer: Optimizer,
    optimizer_args: Sequence[str],
    schedule: Schedule,
    step: int,
    epoch: int,
) -> dict[str, str]:
    """The metadata of a file saved after `step` and `epoch`; empty if `fixed` (`fixed_metadata`) is empty."""
    if not fixed:
        return {}
    values: dict[str, Any] = {
        "ss_session_id": keyed_seed(seed, started) % 2**32,
        "ss_training_started_at": started,
        "ss_training_finished_at": time.time(),
        "ss_optimizer": _optimizer_text(optimizer, optimizer_args),
        "ss_seed": seed,
        "ss_max_train_steps": schedule.max_steps,
        "ss_num_batches_per_epoch": schedule.batches_per_epoch,
        "ss_num_epochs": schedule.num_epochs,
        "ss_steps": step,
        "ss_epoch": epoch,
    }
    return {**fixed, **{key: str(value) for key, value in values.items()}}


def _optimizer_text(optimizer: Optimizer, pairs: Sequence[str]) -> str:
    """The class with its module, and the arguments as Python values: `torch.optim.adamw.AdamW(betas=(0.9, 0.99))`."""
    kind = type(base_of(optimizer))
    arguments = parse_arguments(pairs, "--optimizer_args")
    always = _ALWAYS_PASSED.get(kind.__name__)
    if always is not None and optimizer.defaults.get(always):
        arguments.setdefault(always, optimizer.defaults[always])
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({text})" if text else "")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _require_room(metadata: Mapping[str, str]) -> None:
    """Raises HyimgError if the metadata leave too little room in a header for the tensors' entries."""
    sizes = {key: len(_json(value).encode()) for key, value in metadata.items()}
    if sum(sizes.values()) > MAX_HEADER_BYTES - _TENSOR_ENTRIES_BYTES:
        longest = max(sizes, key=lambda key: sizes[key])
        raise HyimgError(
            f"the metadata of the LoRA files would take {size_text(sum(sizes.values()))}, and the header of a "
            f"safetensors file holds {size_text(MAX_HEADER_BYTES)}: the longest is `{longest}` with "
            f"{size_text(sizes[longest])}",
            hint="shorten it, or give `--no_metadata`",
        )


def hash_metadata(dit: Path | None, vae: Path | None, memo: Memo) -> dict[str, str | None]:
    """The hashes of the base model and the VAE, by the reference tool's keys."""
    values: dict[str, str | None] = {}
    for key, path in (("sd_model", dit), ("vae", vae)):
        values[f"ss_{key}_hash"], values[f"ss_new_{key}_hash"] = model_hashes(path, memo)
    return values


def _of_all_subsets(dataset: Sequence[Mapping[str, Any]], key: str) -> Any:
    first, *others = [subset[key] for of in dataset for subset in of["subsets"]]
    return first if all(other == first for other in others) else None


def _modelspec(options: Mapping[str, Any], dataset: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    width, height = dataset[0]["resolution"]
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{BASE_MODEL}/lora",
        "implementation": "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1",
        "title": options["metadata_title"] or options["output_name"],
        "resolution": f"{width}x{height}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        **{name: options[f"metadata_{name}"] for name in _MODELSPEC_OPTIONS},
    }
    return {f"modelspec.{key}": value for key, value in spec.items() if value is not None}
