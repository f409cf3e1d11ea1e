"""The run folder: which files a run leaves, under which names, each whole or not at all.

NAME.safetensors                  the final LoRA          comfy/NAME.safetensors   the same for ComfyUI
NAME-000002.safetensors           after epoch 2           NAME-step00000100.safetensors   after step 100
NAME.metrics.jsonl                one line a step         NAME.run.toml   every option, resolved
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from hyimg.cache.atomic import atomic_write_text, require_writable_folder
from hyimg.config.load import flatten
from hyimg.config.option import all_options
from hyimg.errors import HyimgError
from hyimg.lora.file import convert, save_lora

if TYPE_CHECKING:
    import torch

COMFY_FOLDER = "comfy"

# Options that say how a command was given, not what the run is
_NOT_REPEATED = ("config", "output_config", "overwrite")


@dataclass(frozen=True)
class RunFolder:
    """The files of the run `name` in `directory`; `save_format` is both, kohya or comfy."""

    directory: Path
    name: str
    save_format: str = "both"

    @property
    def metrics_path(self) -> Path:
        return self.directory / f"{self.name}.metrics.jsonl"

    @property
    def config_path(self) -> Path:
        return self.directory / f"{self.name}.run.toml"

    def lora_path(self, *, epoch: int | None = None, step: int | None = None) -> Path:
        """The LoRA file after an epoch or a step (counted from 1), or the final one."""
        suffix = f"-{epoch:06}" if epoch is not None else f"-step{step:08}" if step is not None else ""
        return self.directory / f"{self.name}{suffix}.safetensors"

    def used_files(self) -> list[Path]:
        """The files that an earlier run of this name left, in a fixed order."""
        own = re.compile(
            re.escape(self.name) + r"(-\d{6}|-step\d{8})?\.(safetensors|metrics\.jsonl|run\.toml)"
        )
        folders = (self.directory, self.directory / COMFY_FOLDER)
        return [
            p
            for folder in folders
            if folder.is_dir()
            for p in sorted(folder.iterdir())
            if own.fullmatch(p.name)
        ]

    def check(self, *, overwrite: bool) -> None:
        """Finds out before any long work whether this run may be written here; changes nothing.

        Raises HyimgError for a name that is a path, a folder that cannot be written, or a used name.
        """
        if not self.name or Path(self.name).name != self.name:
            raise HyimgError(
                f"`--output_name` `{self.name}` must be a plain name", hint="the folder is `--output_dir`"
            )
        require_writable_folder(self.directory)
        # options and metrics alone are no loss: a dry run or an early stop leaves them
        used = [path for path in self.used_files() if path.suffix == ".safetensors"]
        if used and not overwrite:
            raise HyimgError(
                f"`{self.directory}` holds a run named `{self.name}` already (`{used[0].name}`)",
                hint="choose another `--output_name`, or give `--overwrite` to replace it",
            )

    def begin(self, config: object) -> None:
        """Removes the files of an earlier run of this name and writes the resolved options."""
        for path in self.used_files():
            path.unlink()
        self.write_config(config)

    def write_config(self, config: object) -> None:
        """Writes every option, resolved: `hyimg train --config NAME.run.toml` repeats the run."""
        atomic_write_text(self.config_path, config_toml(config))

    def save(
        self,
        path: Path,
        state: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        dtype: torch.dtype,
    ) -> list[Path]:
        """Saves a LoRA in the forms that `save_format` names; `path` is one of `lora_path`. Gives the files."""
        comfy_path = path.parent / COMFY_FOLDER / path.name
        saved = []
        source = path
        if self.save_format == "comfy":
            source = path.with_name(f".{path.name}.kohya")
        else:
            saved.append(path)
        save_lora(source, state, metadata, dtype=dtype)
        if self.save_format != "kohya":
            convert(source, comfy_path, to="comfy")
            saved.append(comfy_path)
        if self.save_format == "comfy":
            source.unlink()
        return saved


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
        values[key] = _plain(value)
    return tomli_w.dumps(values, multiline_strings=True)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
