"""The metadata of a saved LoRA: the reference tool's `ss_*` keys and modelspec, as its users' tools read them.

Values are text, as safetensors metadata must be; what does not exist here is `None`, as that tool writes it.
modelspec: https://github.com/Stability-AI/ModelSpec, version 1.0.1.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hyimg import __version__
from hyimg.cache.identity import Memo
from hyimg.config.load import flatten
from hyimg.data.describe import dataset_dirs
from hyimg.data.sample import Sample
from hyimg.plugins import parse_arguments
from hyimg.randomness import keyed_seed
from hyimg.training.model_hashes import model_hashes
from hyimg.training.run import Run

BASE_MODEL = "hunyuan-image-2.1"

# Options that go into the file under `ss_` and their own name
_OPTIONS = (
    "learning_rate",
    "unet_lr",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "scale_weight_norms",
    "ema_decay",
    "mixed_precision",
    "max_grad_norm",
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

# What the reference tool tells of its other models, and this one does not have
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
# Keys of subsets that are told of the whole where all subsets say the same
_OF_ALL_SUBSETS = (
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
    "resize_interpolation",
)

# Options that go into the modelspec, there without their prefix
_MODELSPEC_OPTIONS = (
    *("author", "description", "license", "tags", "usage_hint", "trigger_phrase", "merged_from"),
)


def training_metadata(
    run: Run,
    samples: Sequence[Sample],
    dataset: Sequence[Mapping[str, Any]],
    started: float,
    *,
    num_validation_images: int,
    hashes: Mapping[str, str | None],
) -> dict[str, str]:
    """The metadata of a file saved at the run's present step.

    `dataset` describes each dataset (`describe_datasets`); `started` is the time the run began, in seconds
    since the epoch; `hashes` are those of the models (`hash_metadata`). With `--no_metadata` the dictionary is
    empty.
    """
    options = flatten(run.config)
    if options["no_metadata"]:
        return {}
    values: dict[str, Any] = {f"ss_{name}": value for name, value in _NOT_HERE.items()}
    values |= {f"ss_{name}": options[name] for name in _OPTIONS}
    values |= {f"ss_{name}": _of_all_subsets(dataset, name) for name in _OF_ALL_SUBSETS}
    if options["dim_from_weights"]:  # as the reference tool's own tools write it where ranks differ
        values |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    values |= {
        "ss_session_id": keyed_seed(run.seed, started) % 2**32,
        "ss_training_started_at": started,
        "ss_training_finished_at": time.time(),
        "ss_base_model_version": BASE_MODEL,
        "ss_sd_model_name": options["dit"].name,
        "ss_vae_name": options["vae"].name if options["vae"] else None,
        "ss_text_encoder_name": options["text_encoder"].name if options["text_encoder"] else None,
        "ss_byt5_name": options["byt5"].name if options["byt5"] else None,
        **hashes,
        "ss_network_args": json.dumps(parse_arguments(options["network_args"], "--network_args"))
        if options["network_args"]
        else None,
        "ss_optimizer": f"{type(run.optimizer).__module__}.{type(run.optimizer).__name__}"
        + (f"({','.join(options['optimizer_args'])})" if options["optimizer_args"] else ""),
        "ss_seed": run.seed,
        "ss_max_train_steps": run.schedule.max_steps,
        "ss_num_batches_per_epoch": run.schedule.batches_per_epoch,
        "ss_num_epochs": run.schedule.num_epochs,
        "ss_steps": run.step,
        "ss_epoch": run.epoch,
        "ss_num_train_images": sum(s.num_repeats for s in samples if not s.subset.is_reg),
        "ss_num_validation_images": num_validation_images,
        "ss_num_reg_images": sum(s.num_repeats for s in samples if s.subset.is_reg),
        "ss_cache_latents": True,
        "ss_datasets": json.dumps(list(dataset)),
        "ss_dataset_dirs": json.dumps(dataset_dirs(dataset)),
        "ss_tag_frequency": json.dumps({k: v for d in dataset for k, v in d["tag_frequency"].items()}),
        "ss_hyimg_version": __version__,
    }
    return {key: str(value) for key, value in values.items()} | _modelspec(options, dataset)


def hash_metadata(dit: Path | None, vae: Path | None, memo: Memo) -> dict[str, str | None]:
    """The hashes of base model and VAE under the reference tool's keys."""
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
