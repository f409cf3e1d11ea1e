"""`hyimg merge`: LoRA files, each with a weight, as one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hyimg.config.commands import MergeConfig
from hyimg.errors import HyimgError
from hyimg.lora import file
from hyimg.report import Reporter, count_text


def merge(config: MergeConfig, report: Reporter) -> file.Conversion:
    """Writes the sum of `loras` to `output`; says what it is made of, and what a smaller rank cost.

    Raises HyimgError for what `hyimg.lora.file.merge` refuses, and for an output that exists.
    """
    options = config.merging
    assert options.output is not None
    weights = _weights(options.loras, options.weights)
    file.require_new_file(options.output, example=options.loras[0], overwrite=options.overwrite)
    done = file.merge(
        list(zip(options.loras, weights, strict=True)),
        options.output,
        to=options.to,
        max_rank=options.max_rank,
        allow_partial=options.allow_partial,
    )
    parts = " + ".join(f"{weight:g} * {path}" for path, weight in zip(options.loras, weights, strict=True))
    report.note(f"{options.output}: {count_text(done.num_modules, 'module')}, {parts}")
    for line in file.describe(done):
        report.note(line)
    return done


def _weights(loras: Sequence[Path], weights: Sequence[float]) -> Sequence[float]:
    if len(loras) < 2:
        raise HyimgError(
            f"there is nothing to merge `{loras[0]}` with",
            hint="name two LoRA files or more, then `--weights`",
        )
    if len(weights) in (0, 1):
        return (*weights, 1.0)[:1] * len(loras)
    if len(weights) != len(loras):
        raise HyimgError(
            f"{count_text(len(weights), 'value')} of `--weights` for {count_text(len(loras), 'LoRA file')}",
            hint="give one for each file, one for all, or none (1)",
        )
    return weights
