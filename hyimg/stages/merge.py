"""`hyimg merge`: adds LoRA files, each with a weight, into one file."""

from __future__ import annotations

from hyimg.config.tools import MergeConfig
from hyimg.errors import HyimgError
from hyimg.lora.files import conversion
from hyimg.rendering.loras import multipliers_of
from hyimg.report import Reporter, count_text


def merge(config: MergeConfig, report: Reporter) -> conversion.Conversion:
    """Writes the sum of `loras` to `output`; says what it is made of, and what a smaller rank cost.

    Raises HyimgError for what `hyimg.lora.files.conversion.merge` refuses, and for an output that exists.
    """
    options = config.merging
    if len(options.loras) < 2:
        raise HyimgError(
            f"there is nothing to merge `{options.loras[0]}` with",
            hint="name two LoRA files or more, then `--weights`",
        )
    weights = multipliers_of(options.loras, options.weights, report, option="--weights")
    conversion.require_new_file(options.output, example=options.loras[0], overwrite=options.overwrite)
    done = conversion.merge(
        list(zip(options.loras, weights, strict=True)),
        options.output,
        to=options.to,
        max_rank=options.max_rank,
        allow_partial=options.allow_partial,
    )
    parts = " + ".join(f"{weight:g} * {path}" for path, weight in zip(options.loras, weights, strict=True))
    report.note(f"{options.output}: {count_text(done.num_modules, 'module')}, {parts}")
    for warning in done.warnings:
        report.warning(warning)
    for line in conversion.describe(done):
        report.note(line)
    return done
