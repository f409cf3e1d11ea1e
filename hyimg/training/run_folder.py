"""The run folder: which files a run leaves, under which names, each whole or not at all.

NAME.safetensors                  the final LoRA          comfy/NAME.safetensors   the same for ComfyUI
NAME-000002.safetensors           after epoch 2           NAME-step00000100.safetensors   after step 100
NAME-000002-state/  NAME-step00000100-state/  NAME-state/   what a run goes on from (`state_folder`)
NAME.metrics.jsonl                one line a step         NAME.run.toml   every option, resolved
NAME.save-now                     made by the user: save at the next step
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from hyimg.cache.atomic import (
    TEMPORARY_SUFFIX,
    atomic_write_text,
    require_writable_folder,
    temporary_name,
    temporary_of,
)
from hyimg.config.names import check_plain_name
from hyimg.errors import HyimgError, RunError
from hyimg.lora.file import convert, save_lora
from hyimg.training.run_file import config_toml

COMFY_FOLDER = "comfy"
SAMPLE_FOLDER = "sample"

# In the folder of files that are set aside, once all of them are
_ALL_ASIDE = "all"

_ENDINGS = r"(\.(safetensors|metrics\.jsonl|run\.toml)|-state)"


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

    @property
    def save_now_path(self) -> Path:
        return self.directory / f"{self.name}.save-now"

    def lora_path(self, *, epoch: int | None = None, step: int | None = None) -> Path:
        """The LoRA file after an epoch or a step (counted from 1), or the final one."""
        return self.directory / f"{self._stem(epoch, step)}.safetensors"

    def state_path(self, *, epoch: int | None = None, step: int | None = None) -> Path:
        """The folder of the state after an epoch or a step, or at the end."""
        return self.directory / f"{self._stem(epoch, step)}-state"

    @property
    def sample_dir(self) -> Path:
        return self.directory / SAMPLE_FOLDER

    def sample_path(self, number: int, *, epoch: int | None = None, step: int | None = None) -> Path:
        """The picture of a prompt (counted from 1) after an epoch or a step."""
        return self.sample_dir / f"{self._stem(epoch, step)}-{number:02}.png"

    def _stem(self, epoch: int | None, step: int | None) -> str:
        suffix = f"-{epoch:06}" if epoch is not None else f"-step{step:08}" if step is not None else ""
        return f"{self.name}{suffix}"

    def used_files(self) -> list[Path]:
        """The files, states and samples that an earlier run of this name left, in a fixed order."""
        return self._own(_ENDINGS) + self._own(r"-\d{2,}\.png", SAMPLE_FOLDER)

    def saved_files(self) -> list[Path]:
        """Those of them that are a loss: LoRA files and states. A dry run leaves the others."""
        return self._own(r"(\.safetensors|-state)")

    def states(self) -> list[Path]:
        """The folders of this run's states, whole or not."""
        return [path for path in self._own("-state") if path.is_dir()]

    def older(self, what: str, *, ending: str, than: int) -> list[Path]:
        """Files saved by "epoch" or "step" whose number is below `than` and whose name ends so."""
        number = re.compile(re.escape(self.name) + (r"-(\d{6})" if what == "epoch" else r"-step(\d{8})"))
        return [
            path
            for path in self._own(re.escape(ending))
            if (found := number.match(path.name)) is not None and int(found[1]) < than
        ]

    def _pattern(self, ending: str) -> re.Pattern[str]:
        return re.compile(re.escape(self.name) + r"(-\d{6}|-step\d{8})?" + ending)

    def _own(self, ending: str, *inner: str) -> list[Path]:
        """What of this run's names has that ending: in the folders `inner`, by default where LoRA files are."""
        own = self._pattern(ending)
        folders = [self.directory / name for name in inner or ("", COMFY_FOLDER)]
        return [
            p
            for folder in folders
            if folder.is_dir()
            for p in sorted(folder.iterdir())
            if own.fullmatch(p.name)
        ]

    def holds(self, state: Path | None) -> bool:
        """Whether a state is one of this run's."""
        return state is not None and any(state.samefile(own) for own in self.states())

    def check(self, *, overwrite: bool, resumed: Path | None = None) -> None:
        """Finds out before any long work whether this run may be written here; leaves nothing behind.

        `resumed` is the state that the run goes on from: where it is one of this run, the name may be used.
        Raises HyimgError for a name that is a path, a folder that cannot be written, or a used name.
        """
        check_plain_name(self.name, "--output_name")
        require_writable_folder(self.directory)
        used = self.saved_files()
        if used and not (overwrite or self.holds(resumed)):
            can_go_on = resumed is None and bool(self.states())
            way_out = ", or `--resume latest` to go on with it" if can_go_on else ""
            raise HyimgError(
                f"`{self.directory}` holds a run named `{self.name}` already (`{used[0].name}`)",
                hint=f"choose another `--output_name`, or give `--overwrite` to replace it{way_out}",
            )

    @contextmanager
    def claim(self, config: object, *, overwrite: bool, resumed: Path | None = None) -> Iterator[None]:
        """The time of a run: no other run has the name meanwhile, and `config` is written.

        The files of an earlier run, where `resumed` is none of them, are set aside, removed by the first save,
        and put back where the run fails before it. Raises HyimgError as `check`, and where another process
        trains under the name.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.directory / f".{self.name}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise HyimgError(
                    f"another process is training `{self.name}` in `{self.directory}`",
                    hint="wait for it, or choose another `--output_name`",
                ) from error
            self._remove_temporaries()
            self._put_back()  # of a run that was killed before its first save
            self.check(overwrite=overwrite, resumed=resumed)
            if not self.holds(resumed):
                self._set_aside()
            self.write_config(config)
            yield
        finally:
            if lock.is_locked:
                self._put_back()
                # unlinked while it is held, so that nobody can hold the old file and another the new one
                with suppress(OSError):
                    Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()

    @property
    def _aside(self) -> Path:
        return self.directory / f".{self.name}.replaced"

    def _set_aside(self) -> None:
        """Moves an earlier run's files away; the mark says that all of them are, and comes last."""
        for path in self.used_files():
            self._move(path, self._aside / path.relative_to(self.directory))
        if self._aside.is_dir():
            (self._aside / _ALL_ASIDE).touch()

    def _put_back(self) -> None:
        """Restores files that are set aside, unless the run that replaces them has saved a LoRA.

        Without the mark a run was killed while it moved them, in either direction: what lies in the folder is
        then the earlier run's too.
        """
        if not self._aside.is_dir():
            return
        mark = self._aside / _ALL_ASIDE
        if mark.exists() and self.saved_files():
            self._discard_aside()
            return
        mark.unlink(missing_ok=True)
        for path in [path for path in self._aside.rglob("*") if path.is_file()]:
            self._move(path, self.directory / path.relative_to(self._aside))
        shutil.rmtree(self._aside)

    def _discard_aside(self) -> None:
        """Removes what is set aside; a kill on the way leaves nothing that could be put back."""
        with suppress(FileNotFoundError):
            going = self._aside.rename(self.directory / temporary_name(self._aside.name[1:]))
            shutil.rmtree(going, ignore_errors=True)

    def _remove_temporaries(self) -> None:
        """Removes what a run of this name that was killed while it saved has left half written."""
        own = self._pattern(_ENDINGS)
        for folder in (self.directory, self.directory / COMFY_FOLDER):
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                name = temporary_of(path.name)
                if name is None or not (own.fullmatch(name) or name == self._aside.name[1:]):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    @staticmethod
    def _move(path: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)

    def write_config(self, config: object) -> None:
        """Writes every option, resolved: `hyimg train --config NAME.run.toml` repeats the run."""
        atomic_write_text(self.config_path, config_toml(config))

    def forms(self, path: Path) -> list[Path]:
        """The files in which a LoRA is saved that has the place `path`, as `save_format` names them."""
        comfy_path = path.parent / COMFY_FOLDER / path.name
        return {"kohya": [path], "comfy": [comfy_path], "both": [path, comfy_path]}[self.save_format]

    def save(
        self,
        path: Path,
        state: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        dtype: torch.dtype,
    ) -> list[Path]:
        """Saves a LoRA in the forms that `save_format` names; `path` is one of `lora_path`. Gives the files.

        Raises RunError where a weight is not finite in `dtype`, or the disk is full.
        """
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor.to(dtype)).all()):
                raise RunError(
                    f"`{name}` is not finite as {dtype}; nothing was saved as `{path.name}`",
                    hint="use `--save_precision bf16` or `float`, or lower `--learning_rate`",
                )
        files = self.forms(path)
        source = path if path in files else path.with_name(f".{path.name}.kohya{TEMPORARY_SUFFIX}")
        try:
            save_lora(source, state, metadata, dtype=dtype)
            for comfy_path in (file for file in files if file != path):
                convert(source, comfy_path, to="comfy")
                _flush(comfy_path)
        finally:
            if source != path:
                source.unlink(missing_ok=True)
        self._discard_aside()
        return files


def _flush(path: Path) -> None:
    """To the disk, which a conversion does not wait for: of some runs this is the only file."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
