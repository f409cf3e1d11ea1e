"""Every key that a dataset file may hold, declared once: where it may stand, what it takes, what it means.

`hyimg.data.dataset_file` reads a file by this table. Names, levels and defaults are the reference tool's,
but for what `help` says; of a key that cannot be honoured with cached latents and text, whose `refusal`
says why, only the value that asks for nothing is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeGuard

from hyimg.data.buckets import SIZE_MULTIPLE
from hyimg.errors import nearest

Level = Literal["dataset", "subset"]
"""The table that a key is about. It may stand in an outer table too, unless `inherited` is false."""

MAX_SIDE = 16384
"""Pixels; well beyond what the model was trained on, and short of sizes that only a slip of the hand makes."""

RESIZE_FILTERS = {
    "lanczos": "lanczos",
    "lanczos4": "lanczos",
    "bicubic": "bicubic",
    "cubic": "bicubic",
    "bilinear": "bilinear",
    "linear": "bilinear",
    "area": "area",
    "box": "box",
    "nearest": "nearest",
}
"""What `resize_interpolation` may be -> the filter's one name."""


@dataclass(frozen=True)
class Key:
    """One key. `parse` turns a TOML or JSON value into the field's, or raises `ValueError` with why not."""

    name: str
    level: Level
    parse: Callable[[object], object]
    help: str
    default: object = None
    inherited: bool = True
    refusal: str | None = None


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _some_text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be text that is not empty")
    return value


def _integer(minimum: int, maximum: int | None = None) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"must be a whole number of at least {minimum}")
        if maximum is not None and value > maximum:
            raise ValueError(f"must be at most {maximum}")
        return value

    return parse


def _number(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if not _is_finite(value) or not low <= value <= high:
            upto = f"between {low:g} and {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise ValueError(f"must be a number {upto}")
        return float(value)

    return parse


def _finite(value: object) -> float:
    if not _is_finite(value):
        raise ValueError("must be a finite number")
    return float(value)


def _multiplier(value: object) -> float:
    number = _finite(value)
    if number == 0:
        raise ValueError("must not be 0, which trains nothing")
    return number


def _is_finite(value: object) -> TypeGuard[int | float]:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _below_one(value: object) -> float:
    number = _number(0, 1)(value)
    if number == 1:
        raise ValueError("must be below 1, since 1 leaves nothing to train on")
    return number


def _resolution(value: object) -> tuple[int, int]:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise ValueError("must be a whole number or [width, height]")
    width, height = (_multiple(side) for side in sides)
    return width, height


def _multiple(value: object) -> int:
    side = _integer(1, MAX_SIDE)(value)
    if side % SIZE_MULTIPLE:
        below = side // SIZE_MULTIPLE * SIZE_MULTIPLE
        near = f"{below} or {below + SIZE_MULTIPLE}" if below else f"{SIZE_MULTIPLE}"
        raise ValueError(f"must be a multiple of {SIZE_MULTIPLE}: take {near}")
    return side


def _range(value: object) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("must be two numbers")
    return _finite(value[0]), _finite(value[1])


def _table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


def _filter(value: object) -> str:
    if not isinstance(value, str) or value not in RESIZE_FILTERS:
        close = nearest(value, RESIZE_FILTERS) if isinstance(value, str) else []
        meant = f"; did you mean `{close[0]}`?" if close else ""
        raise ValueError(f"must be one of {', '.join(f'`{name}`' for name in RESIZE_FILTERS)}{meant}")
    return RESIZE_FILTERS[value]


_RATE = _number(0, 1)
_FROM_ONE_IMAGE = (
    "latents are cached from one fixed view of each image, and this changes the image at each step"
)

_DATASET_KEYS = [
    Key("resolution", "dataset", _resolution, "a side, or [width, height]; multiples of 32"),
    Key("batch_size", "dataset", _integer(1), "images a batch, all of one bucket", 1),
    Key("enable_bucket", "dataset", _flag, "keep aspect ratios, at about one area if `max_bucket_reso` allows", False),
    Key("min_bucket_reso", "dataset", _integer(1, MAX_SIDE), "shortest side (256, or half the resolution)"),
    Key("max_bucket_reso", "dataset", _integer(1, MAX_SIDE), "longest side (1024, or the resolution)"),
    Key("bucket_reso_steps", "dataset", _multiple, "step of bucket sizes; a multiple of 32", 32),
    Key("bucket_no_upscale", "dataset", _flag, "buckets follow the images, none is enlarged", False),
    Key("network_multiplier", "dataset", _multiplier, "strength of the LoRA while training on this dataset", 1.0),
    Key("prior_loss_weight", "dataset", _number(0, math.inf), "loss weight of regularisation images", 1.0),
]  # fmt: skip

_SUBSET_KEYS = [
    Key("image_dir", "subset", _some_text, "folder of images, without its subfolders", inherited=False),
    Key("metadata_file", "subset", _some_text, "JSON of images, captions and tags", inherited=False),
    Key("conditioning_data_dir", "subset", _some_text, "loss masks named as the images", inherited=False),
    Key("is_reg", "subset", _flag, "regularisation images, as many as others", False, False),
    Key("num_repeats", "subset", _integer(0), "times an epoch shows each image; 0 is never", 1),
    Key("caption_extension", "subset", _some_text, "ending of caption files (.txt, then .caption)"),
    Key("class_tokens", "subset", _text, "caption of images that have no caption file"),
    Key("shuffle_caption", "subset", _flag, "shuffle the tags of captions", False),
    Key("keep_tokens", "subset", _integer(0), "this many tags at the front keep their place", 0),
    Key("keep_tokens_separator", "subset", _some_text, "text after the tags that keep their place"),
    Key("secondary_separator", "subset", _some_text, "separates tags that stay together while shuffling"),
    Key("caption_separator", "subset", _some_text, "separates tags", ","),
    Key("caption_prefix", "subset", _text, "put before every line of a caption"),
    Key("caption_suffix", "subset", _text, "put after every line of a caption"),
    Key("enable_wildcard", "subset", _flag, "`{a|b}` is one of them, and so are the lines", False),
    Key("caption_dropout_rate", "subset", _RATE, "how often the caption is left out, 0..1", 0.0),
    Key("caption_dropout_every_n_epochs", "subset", _integer(0), "no captions every nth epoch", 0),
    Key("caption_tag_dropout_rate", "subset", _RATE, "how often each tag is left out, 0..1", 0.0),
    Key("flip_aug", "subset", _flag, "show images mirrored half of the time (both are cached)", False),
    Key("alpha_mask", "subset", _flag, "transparency weights the loss", False),
    Key("validation_split", "subset", _below_one, "part of the images kept for validation, 0..1", 0.0),
    Key("validation_seed", "subset", _integer(0), "which images these are", 0),
    Key("resize_interpolation", "subset", _filter, "resize filter (area to shrink, else lanczos)"),
    Key("custom_attributes", "subset", _table, "anything, handed on with each image"),
    Key("cache_info", "subset", _flag, "remember image sizes (always done)", False),
    Key("token_warmup_min", "subset", _integer(0), "see token_warmup_step", 1),
    Key(
        "token_warmup_step", "subset", _number(0, math.inf), "refused", 0.0,
        refusal="text is cached, and this makes captions depend on the training step",
    ),
    Key("color_aug", "subset", _flag, "refused", False, refusal=_FROM_ONE_IMAGE),
    Key("random_crop", "subset", _flag, "refused", False, refusal=_FROM_ONE_IMAGE),
    Key("face_crop_aug_range", "subset", _range, "refused", refusal=_FROM_ONE_IMAGE),
]  # fmt: skip

KEYS: dict[str, Key] = {key.name: key for key in [*_DATASET_KEYS, *_SUBSET_KEYS]}
