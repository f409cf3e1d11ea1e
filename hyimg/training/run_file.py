"""`NAME.run.toml`: what a run was asked for, resolved, so that it can be repeated and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from hyimg.config.load import flatten

# Options that say how a command was given, not what the run is
_NOT_REPEATED = ("config", "output_config", "overwrite", "resume", "resume_force", "resume_from_huggingface")


def config_toml(config: object) -> str:
    """All options of a config as a TOML run file, paths absolute; those that were not given are left out."""
    values = {}
    for key, value in flatten(config).items():
        if value is None or value == () or key in _NOT_REPEATED:
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
