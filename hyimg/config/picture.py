"""What a picture says of how it was made, and that as options: `infer --from_image`.

The settings stand as JSON in a PNG's text chunk `hyimg`. Most of their keys are options' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyimg.errors import HyimgError

METADATA_KEY = "hyimg"
"""The PNG text chunk, and the key in a latent file's metadata, that holds the settings as JSON."""

FINGERPRINTS = "fingerprints"
"""The key under which the model files stand: fingerprints by option."""

# Settings that are options under the same name: all that changes a picture, if only in its last bits
_OPTIONS = (
    *("prompt", "negative_prompt", "infer_steps", "guidance_scale", "flow_shift", "seed"),
    *("sampler", "sampler_args", "apg_start_step_general", "apg_start_step_ocr"),
    *("guidance_rescale", "guidance_rescale_apg", "batch_cond_uncond", "lora_mode"),
    *("mixed_precision", "attn_mode", "fp8_scaled", "torch_compile", "fp8_vl"),
    *("vae_chunk_size", "vae_tile_size"),
)
_PER_LORA = {
    "lora_multiplier": "multiplier",
    "include_patterns": "include_pattern",
    "exclude_patterns": "exclude_pattern",
}


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a picture, or None where it has none.

    Raises HyimgError for a file that is no picture, and for settings that cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise HyimgError(f"`{path}` cannot be read as a picture") from None
    return parse_settings(text, path)


def parse_settings(text: object, path: Path) -> dict[str, Any] | None:
    """The settings in the text that `path` has under `METADATA_KEY`; None where it has none."""
    if text is None:
        return None
    try:
        settings = json.loads(str(text))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise HyimgError(f"`{METADATA_KEY}` in the metadata of `{path}` is not a table of settings")
    return settings


def picture_options(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a picture was made with, LoRA files included; `given` are the command's own.

    None or an empty list is an option that the picture was made without. Where the command names LoRA files, as many as
    the picture was made with, those act as the picture's did. Raises HyimgError for a picture without settings, and for
    one whose LoRA files are not found.
    """
    settings = read_settings(path)
    # samples of a training have no fingerprints: their adapters were no files yet
    if settings is None or not isinstance(settings.get(FINGERPRINTS), dict):
        raise HyimgError(
            f"`{path}` does not say how it was made",
            hint="take a picture of `hyimg infer` or `hyimg sample`, made without `--no_metadata`",
        )
    options = {name: settings[name] for name in _OPTIONS if name in settings}
    if "width" in settings and "height" in settings:
        options["image_size"] = [settings["height"], settings["width"]]
    records = lora_records(settings, path)
    named = given.get("lora_weight")
    if named is None:
        options["lora_weight"] = [find_lora(record, path) for record in records]
    acts_alike = named is None or len(_listed(named)) == len(records)
    return options | _per_lora(records if acts_alike else [])


def lora_records(settings: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """What a picture tells of its LoRA files: file name, sha256, multiplier, and patterns where it has some."""
    records = settings.get("loras", [])
    if isinstance(records, list) and all(isinstance(r, dict) and "file" in r for r in records):
        return records
    raise HyimgError(f"the LoRA files in the settings of `{path}` are not a list of files")


def find_lora(record: Mapping[str, Any], path: Path) -> Path:
    """The file that a record names: beside the picture, or in the working folder."""
    # a picture may come from anyone: only the name is taken, never a way to elsewhere
    name = Path(str(record["file"])).name
    for place in (path.parent / name, Path(name)):
        if place.is_file():
            return place
    raise HyimgError(
        f"`{path}` was made with the LoRA `{name}`, which is neither beside it nor in the working folder",
        hint=f"say where it is: `--lora_weight FOLDER/{name}`",
    )


def _per_lora(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options with a value for each LoRA file; empty where none of the files has one."""
    options = {}
    for option, key in _PER_LORA.items():
        values = [record.get(key, 1.0 if key == "multiplier" else "") for record in records]
        options[option] = values if any(value != "" for value in values) else []
    return options


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
