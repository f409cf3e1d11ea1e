"""The fingerprint of a run: everything that determines its numbers: options, dataset, caches, base model, length.

A state contains the fingerprint of the run that saved it. A resumed run is bit-equal only if its own is the same;
`differences` lists the differences in the user's words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hyimg import __version__
from hyimg.cache.latents import PIXELS_VERSION
from hyimg.checkpoints.safetensors_file import Checkpoint
from hyimg.config.commands import TrainConfig
from hyimg.config.dataset_options import CachesInTraining, DatasetOptions, DryRun, LatentCaching
from hyimg.config.load import flatten
from hyimg.config.models import TextEncoderFiles, VAEFile
from hyimg.config.option import all_options, groups_of, options_of
from hyimg.config.run_options import Hub, Logging, Metadata, Saving, Validation
from hyimg.config.tools import Common
from hyimg.data.batches import TrainingData
from hyimg.data.samples import Sample
from hyimg.distributed.processes import Processes
from hyimg.lora.files.foreign import lora_identity
from hyimg.memory.device import accelerator, device_name
from hyimg.training.saves import plain
from hyimg.training.steps import Schedule

# Locations, outputs and logging. Files are compared by content
_FREE_GROUPS = (
    *(VAEFile, TextEncoderFiles, DatasetOptions, LatentCaching, CachesInTraining),
    *(Saving, Logging, Metadata, Validation, Hub, DryRun, Common),
)
_NOT_FREE = frozenset({"latent_sampling", "ema_decay"})
_FREE = frozenset(
    {
        *("dit", "base_weights", "network_weights", "dim_from_weights"),  # by content
        *("train_batch_size", "prior_loss_weight", "masked_loss"),  # by what the dataset becomes with them
        *("num_processes", "gradient_accumulation_steps"),  # by the batches that they make a step of
        *("max_train_steps", "max_train_epochs"),  # by the length, where the rate follows it
        *("device", "disable_mmap_load_safetensors", "network_train_unet_only", "strict_patterns"),
        # bit-equal with and without
        *(
            "blocks_to_swap",
            "gradient_checkpointing",
            "checkpoint_keep",
            "cpu_offload_checkpointing",
            "split_attn",
            "fused_backward_pass",
        ),
    }
)
# Schedules in which the rate of a step does not follow from how many there are
_SCHEDULES_OF_ANY_LENGTH = (
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "piecewise_constant",
    "adafactor",
)

_FILES = {
    "latent cache": "the latent cache was made with another VAE",
    "text cache": "the text cache was made with other text encoders",
    "base model": "`--dit` is a different model",
    "base weights": "`--base_weights` are different files",
}

_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 4096


def options_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """All options that determine numbers, as JSON; none is a path, since states may be shared."""
    values = flatten(config)
    return {name: plain(values[name]) for name in _options_that_matter()}


def run_fingerprint(config: TrainConfig, data: TrainingData, schedule: Schedule) -> dict[str, Any]:
    """The complete fingerprint, as JSON. Reads a few blocks of the base model's files, but no tensor."""
    return {
        "options": options_fingerprint(config),
        "dataset": dataset_fingerprint(data.samples) | {"batches": schedule.batches_per_epoch},
        "latent cache": data.latent_store.model_identity,
        "text cache": data.text_store.model_identity,
        "base model": checkpoint_fingerprint(config.dit.dit),
        "base weights": [
            lora_identity(path, checkpoint_fingerprint) for path in config.network_training.base_weights
        ],
        "length": schedule.max_steps,
        "batches a step": schedule.accumulation,
    }


def dataset_fingerprint(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counts, and digests of the images, their captions and their settings."""
    return {
        "images": len(samples),
        "pictures": _digest(_image_fingerprint(s) for s in samples),
        "captions": _digest(s.prompts for s in samples),
        "settings": _digest(
            (
                *(s.num_repeats, s.batch_size, s.weight, s.dataset.network_multiplier),
                *(s.subset.caption_dropout_rate, s.subset.caption_dropout_every_n_epochs),
                s.subset.custom_attributes,
            )
            for s in samples
        ),
    }


def _image_fingerprint(sample: Sample) -> tuple[object, ...]:
    recipes = (sample.recipe(view) for view in sample.flip_variants)
    return (sample.key, sample.dataset_index, *recipes, PIXELS_VERSION)


def checkpoint_fingerprint(path: Path) -> str:
    """Identifies a checkpoint in milliseconds: a digest of its headers and of 64 blocks spread over each file.

    A digest of everything would read 35 GB; differently trained weights differ in every block.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Checkpoint.open(path).files):
        size = file.stat().st_size
        digest.update(f"{size}|".encode())
        with open(file, "rb", buffering=0) as stream:
            header_bytes = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            digest.update(stream.read(header_bytes))
            for number in range(_SAMPLED_BLOCKS):
                span = max(0, size - header_bytes - _BLOCK_BYTES)
                stream.seek(header_bytes + span * number // (_SAMPLED_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def option_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """A line for each option that determines numbers and differs from the state."""
    defaults = {opt.name: plain(opt.default) for opt in all_options(TrainConfig)}
    return [
        f"`--{name}`: {_text(before)} then, {_text(own[name])} now"
        for name in _options_that_matter()
        # an option that the saving release did not have counts as its default
        if (before := saved.get(name, defaults[name])) != own[name]
    ]


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """A line for each part of a fingerprint, except options, that differs from the state."""
    found = _dataset_differences(saved["dataset"], own["dataset"])
    found += [sentence for what, sentence in _FILES.items() if saved[what] != own[what]]
    if saved["batches a step"] != own["batches a step"]:
        found.append(
            "batches a step (`--gradient_accumulation_steps` times the number of processes): "
            f"{saved['batches a step']} then, {own['batches a step']} now"
        )
    if saved["length"] != own["length"] and _rate_follows_length(own["options"]):
        found.append(
            f"the run has {own['length']} steps and had {saved['length']}, and the learning rate depends on that"
        )
    return found


def environment(processes: Processes) -> dict[str, Any]:
    """The environment: with another one, the same run may round differently."""
    kind = accelerator()
    name = device_name(torch.device(kind)) if kind is not None else "none"
    return {
        "hyimg": __version__,
        "torch": torch.__version__,
        "GPU": name,
        "number of threads": torch.get_num_threads(),
        "number of processes": processes.world,
    }


def environment_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What differs from the environment in which the state was saved."""
    return [f"{what} {saved[what]} then, {own[what]} now" for what in own if saved.get(what) != own[what]]


def _options_that_matter() -> list[str]:
    return [
        option.name
        for group in groups_of(TrainConfig).values()
        for option in options_of(group)
        if option.name in _NOT_FREE or (group not in _FREE_GROUPS and option.name not in _FREE)
    ]


def _dataset_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    counts = ("images", "batches")
    if any(saved[what] != own[what] for what in counts):
        before, now = (" and ".join(f"{of[what]} {what}" for what in counts) for of in (saved, own))
        return [f"the dataset: {before} per epoch then, {now} now"]
    what_changed = {
        "pictures": "images of the dataset, or how they are prepared, have changed",
        "captions": "captions of the dataset have changed",
        "settings": "repeats, batch sizes, weights or dropout in the dataset file have changed",
    }
    return [sentence for what, sentence in what_changed.items() if saved[what] != own[what]]


def _rate_follows_length(options: Mapping[str, Any]) -> bool:
    in_fractions = 0 < (options["lr_warmup_steps"] or 0) < 1
    any_length = options["lr_scheduler"] in _SCHEDULES_OF_ANY_LENGTH and not in_fractions
    return options["lr_scheduler_type"] is not None or not any_length


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == []:
        return "not given"
    return " ".join(f'"{item}"' for item in value) if isinstance(value, list) else f"{value}"
