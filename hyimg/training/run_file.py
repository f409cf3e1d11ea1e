"""`NAME.run.toml`: what a run was asked for, resolved, so that it can be repeated and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from hyimg.config.load import flatten
from hyimg.config.option import all_options

# Options that say how a command was given, not what the run is
_NOT_REPEATED = ("config", "output_config", "overwrite", "resume", "resume_force", "resume_from_huggingface")


def config_toml(config: object) -> str:
    """All options of a config as a TOML run file, paths absolute; those that were not given are left out."""
    # what cannot be used yet stands at its default, and would only make the file long
    not_written = {
        opt.name for opt in all_options(type(config)) if opt.traits.later and not opt.traits.available
    }
    not_written |= set(_NOT_REPEATED)
    values = {}
    for key, value in flatten(config).items():
        if value is None or value == () or key in not_written:
            continue
        values[key] = plain(value)
    return tomli_w.dumps(values, multiline_strings=True)


def plain(value: object) -> Any:
    """An option's value as TOML and JSON have it."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value
