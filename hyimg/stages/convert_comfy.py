"""`hyimg convert-comfy`: a LoRA file in another tool's names."""

from __future__ import annotations

from hyimg.config.commands import ConvertComfyConfig
from hyimg.errors import HyimgError
from hyimg.lora.file import Conversion, convert
from hyimg.report import Reporter


def convert_comfy(config: ConvertComfyConfig, report: Reporter) -> Conversion:
    """Converts `source` to `destination`; says what it found and how many modules there were.

    Raises HyimgError for what `hyimg.lora.file.convert` refuses, and for a destination that exists.
    """
    options = config.conversion
    assert options.source is not None
    assert options.destination is not None
    if options.reverse and options.to not in (None, "kohya"):
        raise HyimgError(
            f"`--reverse` means `--to kohya`, but `--to {options.to}` was given", hint="leave one out"
        )
    if options.destination.suffix.lower() != ".safetensors":
        raise HyimgError(
            f"`{options.destination}` does not end with `.safetensors`, which is what is written",
            hint=f"give a file name, say `{options.source.stem}-converted.safetensors`",
        )
    target = "kohya" if options.reverse else options.to or "comfy"
    if options.destination.exists() and not options.overwrite:
        raise HyimgError(f"`{options.destination}` exists", hint="give another name, or `--overwrite`")
    done = convert(options.source, options.destination, to=target)
    source = done.source_format or "another tool's names"
    report.note(f"{options.destination}: {done.num_modules} modules, {source} to {done.target_format}")
    return done
