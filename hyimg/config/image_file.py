"""Image files: opening them safely, and the settings that rendered images carry (`infer --from_image`).

    with opened_image(path) as image:
        image.load()

No other module calls `Image.open`: Pillow chooses a decoder by a file's content, and one of its decoders starts
Ghostscript, so the formats are listed here. The settings are JSON in a PNG's text chunk `hyimg`; most of their keys are
names of options.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hyimg.config.documents import parse_json, require_regular
from hyimg.errors import HyimgError, raise_system_limit

if TYPE_CHECKING:
    from PIL import Image


FORMATS = (
    *("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "JXL", "BMP", "DIB", "GIF", "TIFF", "JPEG2000"),
    *("QOI", "ICO", "PSD", "PPM", "TGA"),
)
"""The formats that are decoded, by Pillow's names. Some need a newer Pillow, or a package that adds them."""


@contextmanager
def opened_image(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    """An open image file, for the time of a block.

    Raises `ValueError` with the reason for any exception in the block: for damaged files, decoders raise
    `struct.error`, `KeyError`, `SyntaxError` or `MemoryError` as well as `OSError`.
    """
    from PIL import Image

    try:
        with Image.open(source, formats=_formats()) as image:
            yield image
    except HyimgError:
        raise
    except Exception as error:
        raise_system_limit(error)
        raise ValueError(_reason(error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this installation can decode."""
    from PIL import Image

    # Large sizes and odd metadata become errors where they matter. Set once for the process, since setting filters
    # around each image is not thread-safe
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image in a supported format"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({error})"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


METADATA_KEY = "hyimg"
"""The PNG text chunk, and the key in a latent file's metadata, that holds the settings as JSON."""

MAX_IMAGE_BYTES = 1_000_000_000
"""The largest image file whose settings are read."""

FINGERPRINTS = "fingerprints"
"""The key of the model files' fingerprints, by option."""

# Settings that are options of the same name: all that changes an image, if only in its last bits
_OPTIONS = (
    *("prompt", "negative_prompt", "infer_steps", "guidance_scale", "flow_shift", "seed"),
    *("sampler", "sampler_args", "apg_start_step_general", "apg_start_step_ocr"),
    *("guidance_rescale", "guidance_rescale_apg", "batch_cond_uncond", "lora_mode"),
    *("mixed_precision", "attn_mode", "fp8_scaled", "torch_compile", "fp8_vl", "text_encoder_dtype"),
    *("vae_chunk_size", "vae_tile_size"),
)
# What older images were made with and do not record
_UNSAID = {"text_encoder_dtype": "bf16"}
_PER_LORA = {
    "lora_multiplier": "multiplier",
    "include_patterns": "include_pattern",
    "exclude_patterns": "exclude_pattern",
}


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in an image, or None if it has none.

    Raises HyimgError for a file that is not an image, and for settings that cannot be read.
    """
    try:
        require_regular(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise HyimgError(f"cannot read the image `{path}`: {error.strerror}") from None
    try:
        with opened_image(path) as image:
            text = image.info.get(METADATA_KEY)
    except ValueError:
        raise HyimgError(f"`{path}` cannot be read as an image") from None
    return parse_settings(text, path)


def is_whole(path: Path) -> bool:
    """Whether an image can be decoded completely."""
    try:
        with opened_image(path) as image:
            image.load()
    except ValueError:
        return False
    return True


def parse_settings(text: object, path: Path) -> dict[str, Any] | None:
    """The settings in the text that `path` has under `METADATA_KEY`, or None."""
    if text is None:
        return None
    settings: dict[str, Any] = parse_json(str(text), f"`{METADATA_KEY}` in the metadata of `{path}`")
    return _UNSAID | settings


def image_options(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an image was made with, including LoRA files; `given` are the command's own.

    None or an empty list is an option that the image was made without. If the command names as many LoRA files as the
    image was made with, they get its multipliers and patterns. Raises HyimgError for an image without settings, and for
    LoRA files that are not found.
    """
    settings = read_settings(path)
    # training samples have no fingerprints: their adapters were not saved yet
    if settings is None or not isinstance(settings.get(FINGERPRINTS), dict):
        raise HyimgError(
            f"`{path}` has no settings to render it from",
            hint="give an image made by `hyimg infer` or `hyimg sample` without `--no_metadata`",
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
    """What an image records of its LoRA files: file name, sha256, multiplier, and patterns if any."""
    records = settings.get("loras", [])
    if isinstance(records, list) and all(isinstance(r, dict) and "file" in r for r in records):
        return records
    raise HyimgError(f"the LoRA files in the settings of `{path}` are not a list of files")


def find_lora(record: Mapping[str, Any], path: Path) -> Path:
    """The file that a record names: next to the image, or in the working folder."""
    # an image may come from anyone: only the name is used, never a path
    name = Path(str(record["file"])).name
    for place in (path.parent / name, Path(name)):
        if os.path.exists(place):  # PEFT's LoRAs are folders; a name may be too long for any file
            return place
    raise HyimgError(
        f"`{path}` was made with the LoRA `{name}`, which is neither next to it nor in the working folder",
        hint=f"give its place: `--lora_weight FOLDER/{name}`",
    )


def _per_lora(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options with a value for each LoRA file; empty where no file has one."""
    options = {}
    for option, key in _PER_LORA.items():
        values = [record.get(key, 1.0 if key == "multiplier" else "") for record in records]
        options[option] = values if any(value != "" for value in values) else []
    return options


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
