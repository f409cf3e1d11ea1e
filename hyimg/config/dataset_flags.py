"""The reference tool's dataset flags, and the dataset file that says the same."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from hyimg.config.names import printable

Kind = Literal["switch", "int", "float", "text", "size"]


@dataclass(frozen=True)
class DatasetFlag:
    """A flag that is the key `key` of a dataset file, in the table `table`; a switch takes no value."""

    key: str
    kind: Kind
    table: Literal["general", "subset", "regularisation"] = "general"


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
    "dataset_repeats": DatasetFlag("num_repeats", "int"),
    "class_tokens": DatasetFlag("class_tokens", "text"),
    "caption_extension": DatasetFlag("caption_extension", "text"),
    "caption_extention": DatasetFlag("caption_extension", "text"),
    "caption_separator": DatasetFlag("caption_separator", "text"),
    "caption_prefix": DatasetFlag("caption_prefix", "text"),
    "caption_suffix": DatasetFlag("caption_suffix", "text"),
    "caption_dropout_rate": DatasetFlag("caption_dropout_rate", "float"),
    "caption_dropout_every_n_epochs": DatasetFlag("caption_dropout_every_n_epochs", "int"),
    "caption_tag_dropout_rate": DatasetFlag("caption_tag_dropout_rate", "float"),
    "shuffle_caption": DatasetFlag("shuffle_caption", "switch"),
    "keep_tokens": DatasetFlag("keep_tokens", "int"),
    "keep_tokens_separator": DatasetFlag("keep_tokens_separator", "text"),
    "secondary_separator": DatasetFlag("secondary_separator", "text"),
    "enable_wildcard": DatasetFlag("enable_wildcard", "switch"),
    "flip_aug": DatasetFlag("flip_aug", "switch"),
    "alpha_mask": DatasetFlag("alpha_mask", "switch"),
}

# `10_ohwx man`: how the reference tool's folder names give repeats and class tokens
_CLASS_FOLDER = re.compile(r"(\d+)_(.+)")
# for what was not typed; to be filled in by the reader
_PLACE_HOLDER = "images"


def dataset_toml(given: Mapping[str, Any]) -> str:
    """The dataset file made from flags of `DATASET_FLAGS` (name -> text as typed, or a value of TOML)."""
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
    return printable(text).rstrip()


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


def _value(kind: Kind, raw: Any) -> Any:
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
