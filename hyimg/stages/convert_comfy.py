"""`hyimg convert-comfy`: converts a LoRA file to another tool's format."""

from __future__ import annotations

from hyimg.config.tools import ConvertComfyConfig
from hyimg.errors import HyimgError
from hyimg.lora.files.conversion import Conversion, convert, describe, require_new_file
from hyimg.report import Reporter


def convert_comfy(config: ConvertComfyConfig, report: Reporter) -> Conversion:
    """Converts `source` to `destination`; reports what it found, what it dropped, and the error of a smaller rank.

    Raises HyimgError for what `hyimg.lora.files.conversion.convert` refuses, and for a destination that exists.
    """
    options = config.conversion
    if options.reverse and options.to not in (None, "kohya"):
        raise HyimgError(
            f"`--reverse` means `--to kohya`, but `--to {options.to}` was given", hint="leave one out"
        )
    require_new_file(options.destination, example=options.source, overwrite=options.overwrite)
    done = convert(
        options.source,
        options.destination,
        to="kohya" if options.reverse else options.to or "comfy",
        max_rank=options.max_rank,
        allow_partial=options.allow_partial,
    )
    source = done.source_format or "another tool's names"
    report.note(f"{options.destination}: {done.num_modules} modules, {source} to {done.target_format}")
    for warning in done.warnings:
        report.warning(warning)
    for line in describe(done):
        report.note(line)
    return done
