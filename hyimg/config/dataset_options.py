"""Options about the dataset and its caches, and the reference tool's dataset flags as a dataset file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from hyimg.config.option import ABSENT, REQUIRED, Fact, Given, option


@dataclass(frozen=True, kw_only=True)
class DatasetFileOptions:
    """Dataset and caches."""

    dataset_config: Path = option(REQUIRED, is_input=True, help="the dataset file, TOML or JSON")
    cache_dir: Path | None = option(
        None, help="folder of the caches (not given: `hyimg-cache` next to the dataset file)"
    )
    on_bad_image: str = option(
        "error",
        choices=("error", "skip"),
        help="what to do about an image that cannot be read: stop, or skip it with a warning",
    )


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(DatasetFileOptions):
    """Dataset and caches."""

    caption_variants: int = option(
        8,
        minimum=1,
        maximum=10_000,
        limits="every variant is encoded and stored",
        help="cached variants of a caption with randomness (shuffling, wildcards, tag dropout)",
        needs=(Fact("random_captions", "no caption of the dataset has shuffling, wildcards or tag dropout"),),
    )
    caption_transform: tuple[str, ...] = option(
        (),
        help="plugin functions applied to each caption, in this order, before its variants are drawn",
    )
    caption_transform_args: tuple[str, ...] = option(
        (),
        help='arguments of the caption transforms, `"name=value"`; each goes to the functions that accept it',
    )


@dataclass(frozen=True, kw_only=True)
class NamedDataset(DatasetOptions):
    """Dataset and caches."""

    dataset_config: Path = option(REQUIRED, argument=True, help="the dataset file, TOML or JSON")


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Report."""

    dry_run: bool = option(False, help="print the report of `hyimg dataset` for these options and exit")


@dataclass(frozen=True, kw_only=True)
class ReportOutput:
    """Output."""

    json: bool = option(False, help="print JSON")
    contact_sheet: Path | None = option(
        None, help="PNG file to write: each bucket with a few of its images, cropped"
    )


@dataclass(frozen=True, kw_only=True)
class ReportModels:
    """Model files (optional; the report covers the caches made with them)."""

    vae: Path | None = option(None, pipeline_part="vae", help="the VAE, a file or a folder")
    text_encoder: Path | None = option(
        None, pipeline_part="text_encoder", help="Qwen2.5-VL, a file or a folder (with `--byt5`)"
    )
    byt5: Path | None = option(
        None, pipeline_part="text_encoder_2", help="byT5 glyph encoder (with `--text_encoder`)"
    )
    fp8_vl: bool = option(
        False, help="the text cache was made with `--fp8_vl`", needs=(Given("text_encoder"),)
    )
    text_encoder_dtype: str = option(
        "auto",
        choices=("auto", "bf16", "fp32"),
        synonyms={"bfloat16": "bf16", "float32": "fp32", "float": "fp32"},
        help="type of the text cache (`auto`: the one that training would use)",
    )
    tokenizer: Path | None = option(
        None,
        pipeline_part="tokenizer",
        aliases=("tokenizer_cache_dir",),
        help="folder with the Qwen tokenizer's files, or a `qwen.tiktoken` file, to count the captions' tokens "
        "(not given: as in cache-text, but nothing is downloaded)",
    )


@dataclass(frozen=True, kw_only=True)
class ReportTraining:
    """Training settings for the estimate."""

    train_batch_size: int | None = option(
        None,
        minimum=1,
        help="batch size where the dataset file sets none (not given: 1)",
        needs=(Fact("left_to_flags", "the dataset file sets it everywhere"),),
    )
    gradient_accumulation_steps: int = option(1, minimum=1, help="batches per optimiser step")
    validation_split: float | None = option(
        None,
        minimum=0,
        maximum=1,
        help="share of each subset's images held out for validation, where the dataset file sets none",
        needs=(Fact("left_to_flags", "the dataset file sets it everywhere"),),
    )
    validation_seed: int | None = option(
        None,
        minimum=0,
        help="seed that picks these images (not given: 0)",
        needs=(Fact("validates", "no image is held out for validation"),),
    )
    sample_prompts: Path | None = option(
        None, help="prompt file (txt, toml or json) whose prompts cache-text also caches"
    )


@dataclass(frozen=True, kw_only=True)
class LatentCaching:
    """Latent cache."""

    vae_batch_size: int = option(
        1,
        minimum=1,
        help="images of one bucket encoded together",
        needs=(Given("cache_latents", "cache_latents_to_disk"),),
    )


@dataclass(frozen=True, kw_only=True)
class TextCaching:
    """Text cache."""

    sample_prompts: Path | None = option(
        None,
        is_input=True,
        help="prompt file (txt, toml or json) whose prompts are also cached, so that rendering needs no text encoder",
    )


@dataclass(frozen=True, kw_only=True)
class CacheUpkeep:
    """Cache maintenance."""

    verify: bool = option(
        False,
        help="read all entries that the dataset uses and compare their checksums; damaged ones are reported and "
        "encoded again",
    )
    prune: bool = option(
        False,
        help="then remove this model's entries that the dataset does not use, and report the space freed",
    )
    keep_for: tuple[Path, ...] = option(
        (), help="with `--prune`: other dataset files that use this cache, whose entries are also kept"
    )


@dataclass(frozen=True, kw_only=True)
class CachesInTraining:
    """Caching before training."""

    cache_latents: bool = option(
        False, help="run cache-latents first (the cache is content-addressed and stays on disk)"
    )
    cache_latents_to_disk: bool = option(False, help="the same as `--cache_latents`")
    cache_text_encoder_outputs: bool = option(False, help="run cache-text first (the cache stays on disk)")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="the same as `--cache_text_encoder_outputs`"
    )
    skip_cache_check: bool = option(
        False,
        help="assume that all entries exist; a missing one is an error at the step that needs it",
    )
    latent_sampling: str = option(
        "sample",
        choices=("sample", "mean"),
        help="a fresh posterior sample at each step, or the mean",
        reference_default=ABSENT,
        differs="one posterior sample, drawn at caching, there",
    )
    max_data_loader_n_workers: int = option(
        0,
        minimum=0,
        help="processes that prefetch from the caches",
        reference_default=8,
        differs="reading a cached batch takes a small fraction of a step",
    )
    persistent_data_loader_workers: bool = option(
        False, help="keep these processes between epochs", needs=(Given("max_data_loader_n_workers"),)
    )


KeyKind = Literal["switch", "int", "float", "text", "size"]


@dataclass(frozen=True)
class DatasetFlag:
    """A flag that is the key `key` of a dataset file, in the table `table`; a switch takes no value.

    `nothing` are values that are the default anyway.
    """

    key: str
    kind: KeyKind
    table: Literal["general", "subset", "regularisation"] = "general"
    nothing: tuple[object, ...] = ()


DATASET_FLAGS: Mapping[str, DatasetFlag] = {
    "train_data_dir": DatasetFlag("image_dir", "text", "subset"),
    "in_json": DatasetFlag("metadata_file", "text", "subset"),
    "conditioning_data_dir": DatasetFlag("conditioning_data_dir", "text", "subset"),
    "reg_data_dir": DatasetFlag("image_dir", "text", "regularisation"),
    "resolution": DatasetFlag("resolution", "size"),
    "enable_bucket": DatasetFlag("enable_bucket", "switch"),
    "min_bucket_reso": DatasetFlag("min_bucket_reso", "int"),
    "max_bucket_reso": DatasetFlag("max_bucket_reso", "int"),
    "bucket_reso_steps": DatasetFlag("bucket_reso_steps", "int"),
    "bucket_no_upscale": DatasetFlag("bucket_no_upscale", "switch"),
    "resize_interpolation": DatasetFlag("resize_interpolation", "text"),
    "dataset_repeats": DatasetFlag("num_repeats", "int", nothing=(1,)),
    "class_tokens": DatasetFlag("class_tokens", "text"),
    "caption_extension": DatasetFlag("caption_extension", "text", nothing=(".txt",)),
    "caption_extention": DatasetFlag("caption_extension", "text", nothing=(".txt",)),
    "caption_separator": DatasetFlag("caption_separator", "text", nothing=(",",)),
    "caption_prefix": DatasetFlag("caption_prefix", "text"),
    "caption_suffix": DatasetFlag("caption_suffix", "text"),
    "caption_dropout_rate": DatasetFlag("caption_dropout_rate", "float", nothing=(0,)),
    "caption_dropout_every_n_epochs": DatasetFlag("caption_dropout_every_n_epochs", "int", nothing=(0,)),
    "caption_tag_dropout_rate": DatasetFlag("caption_tag_dropout_rate", "float", nothing=(0,)),
    "shuffle_caption": DatasetFlag("shuffle_caption", "switch"),
    "keep_tokens": DatasetFlag("keep_tokens", "int", nothing=(0,)),
    "keep_tokens_separator": DatasetFlag("keep_tokens_separator", "text"),
    "secondary_separator": DatasetFlag("secondary_separator", "text"),
    "enable_wildcard": DatasetFlag("enable_wildcard", "switch"),
    "flip_aug": DatasetFlag("flip_aug", "switch"),
    "alpha_mask": DatasetFlag("alpha_mask", "switch"),
}

DATASET_PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")
"""The keys of a dataset file whose values are paths."""

# `10_ohwx man`: how the reference tool's folder names give repeats and class tokens
_CLASS_FOLDER = re.compile(r"(\d+)_(.+)")
# for what was not typed; to be filled in by the reader
_PLACE_HOLDER = "images"


def dataset_toml(given: Mapping[str, Any]) -> list[str]:
    """The lines of the dataset file made from flags of `DATASET_FLAGS` (name -> text as typed, or a value of TOML)."""
    general: dict[str, Any] = {}
    subset: dict[str, Any] = {}
    subsets: list[dict[str, Any]] = []
    for name, raw in given.items():
        flag = DATASET_FLAGS[name]
        value = _value(flag.kind, raw)
        if flag.table == "regularisation":
            subsets += [{**found, "is_reg": True} for found in _image_folders(str(value))]
        elif name != "train_data_dir":
            (general if flag.table == "general" else subset)[flag.key] = value
    folders = _image_folders(str(given["train_data_dir"])) if "train_data_dir" in given else []
    if not folders:
        folders = [{} if "metadata_file" in subset else {"image_dir": _PLACE_HOLDER}]
    subsets = [{**found, **subset} for found in folders] + subsets
    resolution = general.pop("resolution", 1024)
    tables = [("[general]", general)] if general else []
    tables += [("[[datasets]]", {"resolution": resolution})]
    tables += [("[[datasets.subsets]]", found) for found in subsets]
    text = "\n".join(f"{heading}\n{tomli_w.dumps(table)}" for heading, table in tables)
    return text.rstrip().split("\n")


def _image_folders(folder: str) -> list[dict[str, Any]]:
    """A subset for each `REPEATS_TOKENS` folder below, or one for the folder itself where there is none."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except (OSError, ValueError):
        names = []
    found = [(name, match) for name in names if (match := _CLASS_FOLDER.fullmatch(name))]
    return [
        {"image_dir": str(Path(folder) / name), "num_repeats": int(match[1]), "class_tokens": match[2]}
        for name, match in found
    ] or [{"image_dir": folder}]


def _value(kind: KeyKind, raw: Any) -> Any:
    """The typed value as TOML writes it; what is no number stays text, for the dataset file's own check."""
    if kind == "switch":
        return True
    if not isinstance(raw, str):
        return raw
    try:
        if kind == "size":
            sides = [int(side) for side in raw.split(",")]
            return sides[0] if len(set(sides)) == 1 else sides
        return int(raw) if kind == "int" else float(raw) if kind == "float" else raw
    except ValueError:
        return raw
