"""The run folder: the files of a run and their names, each written completely or not at all.

NAME.safetensors                  the final LoRA          comfy/NAME.safetensors   the same for ComfyUI
NAME-000002.safetensors           after epoch 2           NAME-step00000100.safetensors   after step 100
NAME-000002-state/  NAME-step00000100-state/  NAME-state/   what a run resumes from (`hyimg.training.state`),
                                                            in `--state_dir` if that is given
NAME.metrics.jsonl                one line a step         NAME.run.toml   every option, resolved, and a list of saves
NAME.save-now                     made by the user: save at the next step

A save is in the list of NAME.run.toml before its first file is written, and complete after its last. So it is known
which files are the run's, and which save a killed run has not finished. No link below these folders is followed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from hyimg.cache.atomic import atomic_write_text, require_writable_folder, sole_process
from hyimg.cache.own_files import (
    is_link,
    is_own_folder,
    list_folder,
    remove_leftovers,
    require_no_links,
    temporary_of,
    temporary_stem,
)
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.config.documents import DOCUMENT_BYTES, read_bounded
from hyimg.config.values import check_plain_name
from hyimg.errors import HyimgError, RunError
from hyimg.lora.files.conversion import comfy_state, save_lora
from hyimg.training.saves import ReplacedRun, Saves, config_toml, read_saves, with_saves
from hyimg.training.state import is_whole_state, tidy_state

COMFY_FOLDER = "comfy"
SAMPLE_FOLDER = "sample"

_LORA, _STATE, _METRICS, _RUN_FILE = ".safetensors", "-state", ".metrics.jsonl", ".run.toml"
_CHECKPOINT = r"(-\d{6}|-step\d{8})"
# A temporary file of earlier releases, which a run that they began may have left
_SOURCE = ".kohya"


@dataclass(frozen=True)
class RunFolder:
    """The files of the run `name` in `directory`; `save_format` is both, kohya or comfy.

    `state_dir` is where states are saved, by default next to the LoRA files; `heading` is a comment at the top of
    NAME.run.toml.
    """

    directory: Path
    name: str
    save_format: str = "both"
    state_dir: Path | None = None
    heading: str = ""

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
        return self.states_directory / f"{self._stem(epoch, step)}-state"

    @property
    def states_directory(self) -> Path:
        """Where states are saved; those that lie in the run folder are found too."""
        if self.state_dir is None or self.state_dir.resolve() == self.directory.resolve():
            return self.directory
        return self.state_dir

    @property
    def _roots(self) -> list[Path]:
        """The folders that hold the run's files, without those inside of them; the run folder first."""
        return list(dict.fromkeys((self.directory, self.states_directory)))

    @property
    def sample_dir(self) -> Path:
        return self.directory / SAMPLE_FOLDER

    def sample_path(self, number: int, *, epoch: int | None = None, step: int | None = None) -> Path:
        """The picture of a prompt (counted from 1) after an epoch or a step."""
        return self.sample_dir / f"{self._stem(epoch, step)}-{number:02}.png"

    def _stem(self, epoch: int | None, step: int | None) -> str:
        suffix = f"-{epoch:06}" if epoch is not None else f"-step{step:08}" if step is not None else ""
        return f"{self.name}{suffix}"

    def place_of(self, path: Path) -> tuple[int | None, int | None]:
        """The epoch or the step whose number a LoRA file or state of this run has; neither for the final ones."""
        number = _without_ending(path).removeprefix(self.name)
        if number.startswith("-step"):
            return None, int(number.removeprefix("-step"))
        return (int(number[1:]), None) if number else (None, None)

    def used_files(self) -> list[Path]:
        """The files, states and samples that an earlier run of this name left, in a fixed order."""
        own = [path for path in (self.config_path, self.metrics_path) if path.is_file() or is_link(path)]
        samples = re.compile(re.escape(self.name) + _CHECKPOINT + r"-\d{2,}\.png")
        own += [path for path in self._listed(self.sample_dir) if samples.fullmatch(path.name)]
        return self._own_saves(self.saves().names) + own

    def saved_files(self, *, complete: bool = False) -> list[Path]:
        """Those of them that are a loss: LoRA files and states. A dry run leaves the others. With `complete` only those
        of complete saves: not what a run left that was killed, or found the disk full, in its first save.
        """
        saves = self.saves()
        if complete and saves.begun is not None and not self._is_whole(saves.begun):
            return self._own_saves(saves.done)
        return self._own_saves(saves.names)

    def states(self) -> list[Path]:
        """The folders of this run's states, whole or not; those that were copied here too."""
        return [path for path in self._saves_by_name() if path.name.endswith(_STATE)]

    def older(self, what: str, *, ending: str, than: int) -> list[Path]:
        """Files saved by "epoch" or "step" whose number is below `than` and whose name ends so."""
        number = re.compile(re.escape(self.name) + (r"-(\d{6})" if what == "epoch" else r"-step(\d{8})"))
        return [
            path
            for path in self._own_saves(self.saves().names)
            if path.name.endswith(ending)
            and (found := number.match(path.name)) is not None
            and int(found[1]) < than
        ]

    def saves(self) -> Saves:
        """What the run file lists. Of a run of an earlier release, which has no list, every name that fits, but for
        those of runs that have a run file themselves."""
        listed = None if is_link(self.config_path) else read_saves(self.config_path)
        if listed is not None:
            fits = re.compile(re.escape(self.name) + _CHECKPOINT + "?")
            begun = listed.begun
            if begun is not None and not fits.fullmatch(begun.removesuffix(_STATE)):
                begun = None
            return Saves(tuple(name for name in listed.done if fits.fullmatch(name)), begun)
        return Saves(tuple({_without_ending(path) for path in self._saves_by_name()}))

    def begin_save(self, *, epoch: int | None = None, step: int | None = None, state: bool) -> None:
        """Notes a save, with its state or without, before its first file is written. Raises as `atomic_path`."""
        saves, name = self.saves(), self._stem(epoch, step)
        done = [other for other in saves.names if other != name or other in saves.done]
        self._note(Saves(tuple(done), name + (_STATE if state else "")))

    def end_save(self) -> None:
        """Notes that the save is complete. Raises as `atomic_path`."""
        self._note(Saves(tuple(self.saves().names)))

    def _note(self, saves: Saves) -> None:
        try:
            text = (
                "" if is_link(self.config_path) else read_bounded(self.config_path, DOCUMENT_BYTES).decode()
            )
        except (OSError, UnicodeDecodeError):
            text = ""  # which somebody has removed meanwhile
        atomic_write_text(self.config_path, with_saves(text, saves), root=self.directory)

    def _is_whole(self, begun: str) -> bool:
        """Whether a save that has begun has its last file."""
        if begun.endswith(_STATE):
            return any(is_whole_state(root / begun) for root in self._roots)
        return all(file.is_file() for file in self.forms(self.directory / f"{begun}{_LORA}"))

    def _saves_by_name(self, *, others: bool = False) -> list[Path]:
        """Everything whose name could be that of a LoRA file or state of this run, in a fixed order.

        With `others` also what another run's final files are, since it has a run file: an earlier release let runs
        be called `NAME-000002`.
        """
        fits = re.compile(re.escape(self.name) + _CHECKPOINT + f"?({re.escape(_LORA)}|{_STATE})")
        found = [
            path for folder in self._folders for path in self._listed(folder) if fits.fullmatch(path.name)
        ]
        if others:
            return found
        names = {_without_ending(path) for path in found} - {self.name}
        another = {name for name in names if (self.directory / f"{name}{_RUN_FILE}").is_file()}
        return [path for path in found if _without_ending(path) not in another]

    def _own_saves(self, names: Collection[str]) -> list[Path]:
        """The LoRA files and states of these names."""
        return [path for path in self._saves_by_name() if _without_ending(path) in names]

    def _listed(self, folder: Path) -> list[Path]:
        """What is in a folder; of what is named as a state, folders only."""
        return [
            Path(entry.path)
            for entry in list_folder(folder, root=self.root_of(folder))
            if not entry.name.endswith(_STATE) or is_own_folder(entry)
        ]

    @property
    def _folders(self) -> list[Path]:
        return list(dict.fromkeys((self.directory, self.directory / COMFY_FOLDER, self.states_directory)))

    def root_of(self, path: Path) -> Path:
        """Which of the folders that the user gave a path lies in: it may be a link, and nothing below it."""
        return max((r for r in self._roots if path.is_relative_to(r)), key=lambda root: len(root.parts))

    def holds(self, state: Path | None) -> bool:
        """Whether a state is one of this run's."""
        return state is not None and any(state.samefile(own) for own in self.states())

    def check(self, *, overwrite: bool, resumed: Path | None = None, restarts: bool = False) -> None:
        """Finds out before any long work whether this run may be written here; leaves nothing behind.

        Where `resumed`, the state that the run resumes from, is one of this run, the name may be used. A run that
        `restarts` (`--resume latest`) without one may replace a save that was not completed. Raises HyimgError for a
        name that is a path or could be a checkpoint's, a folder that cannot be written or has links where the run
        writes, a used name, or a file of another run that a save would replace.
        """
        check_plain_name(self.name, "--output_name")
        for root in self._roots:
            require_writable_folder(root)
        self._check_links()
        is_own = self.holds(resumed)
        if re.search(_CHECKPOINT + "$", self.name) and not is_own:
            raise HyimgError(
                f"`--output_name` `{self.name}` ends like the checkpoints of another run",
                hint="choose a name that does not end in `-` and six digits, or in `-step` and eight",
            )
        used = self.saved_files(complete=restarts)
        if used and not (overwrite or is_own):
            can_go_on = resumed is None and bool(self.states() or not self.saved_files(complete=True))
            way_out = ", or `--resume latest` to continue it" if can_go_on else ""
            raise HyimgError(
                f"`{used[0].parent}` holds a run named `{self.name}` already (`{used[0].name}`)",
                hint=f"choose another `--output_name`, or give `--overwrite` to replace it{way_out}",
            )
        own = self.saves().names | ({_without_ending(resumed)} if is_own and resumed is not None else set())
        for path in self._saves_by_name(others=True):
            if _without_ending(path) not in own and (path.is_file() or is_whole_state(path)):
                raise HyimgError(
                    f"`{path}` is not a save of `{self.name}`, but a save of this run would have that name",
                    hint="move it to another folder, or choose another `--output_name`",
                )

    def _check_links(self) -> None:
        """Raises LinkError for a link in place of a folder in which the run writes or removes."""
        inner = [self.directory / COMFY_FOLDER, self.sample_dir]
        inner += [root / self._replaced.folder_name for root in self._roots]
        for root in self._roots:
            inner += [Path(e.path) for e in list_folder(root, root=root) if e.name.endswith(_STATE)]
        state = re.compile(re.escape(self.name) + _CHECKPOINT + "?" + _STATE)
        for folder in inner:
            if not folder.name.endswith(_STATE) or state.fullmatch(folder.name):
                require_no_links(folder, root=self.root_of(folder))

    @contextmanager
    def claim(
        self, config: object, *, overwrite: bool, resumed: Path | None = None, restarts: bool = False
    ) -> Iterator[None]:
        """The time of a run: no other run has the name meanwhile, and `config` is written.

        The files of an earlier run, where `resumed` is none of them, are set aside, removed by the first save,
        and put back where the run fails before it. Raises HyimgError as `check`, and where another process
        trains under the name.
        """
        with self._lock():
            try:
                self._clean_up()
                self.check(overwrite=overwrite, resumed=resumed, restarts=restarts)
                is_own = self.holds(resumed)
                if not is_own:
                    self._replaced.set_aside(self.used_files())
                adopted = _without_ending(resumed) if is_own and resumed is not None else ""
                self.write_config(config, adopted=adopted)
                yield
            finally:
                self._put_back()

    def clean_up(self) -> None:
        """Removes what a killed run left half done, its lock too; for a run that has nothing left to train. Raises
        HyimgError where another process trains under the name.
        """
        with self._lock():
            self._clean_up()

    def _clean_up(self) -> None:
        self._check_links()
        for folder in (*self._folders, self.sample_dir):
            remove_leftovers(folder, self._is_own_temporary, root=self.root_of(folder))
        self._put_back()  # of a run that was killed before its first save
        for state in self._own_saves(self.saves().names):
            if state.name.endswith(_STATE):
                tidy_state(state, root=self.root_of(state))
        begun = self.saves().begun
        if begun is not None and self._is_whole(begun):
            self.end_save()

    def _is_own_temporary(self, stem: str) -> bool:
        """Whether a temporary name's stem is that of a file of this run."""
        inner = temporary_of(stem)  # of a temporary file that was saved in turn
        stem = stem if inner is None else inner
        ending = re.search(
            _CHECKPOINT
            + f"?({re.escape(_LORA)}({_SOURCE})?|{_STATE}|"
            + r"\.metrics\.jsonl|\.run\.toml|-\d{2,}\.png)$",
            stem,
        )
        names = [self._replaced.folder_name] + ([self.name + ending[0]] if ending is not None else [])
        return stem in [temporary_stem(name) for name in names]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with ExitStack() as locks:
            for root in self._roots:  # two runs may share a folder for states
                busy = HyimgError(
                    f"another process is training `{self.name}` in `{root}`",
                    hint="wait for it, or choose another `--output_name`",
                )
                locks.enter_context(sole_process(root / f".{self.name}.lock", busy))
            yield

    @property
    def _replaced(self) -> ReplacedRun:
        return ReplacedRun(self.name, self._roots)

    def _put_back(self) -> None:
        self._replaced.put_back(replaced=bool(self._own_saves(self.saves().names)))

    def write_config(self, config: object, *, adopted: str = "") -> None:
        """Writes every option, resolved: `hyimg train --config NAME.run.toml` repeats the run. What the run has saved
        stays in the list, with the save of the name `adopted`."""
        saves = self.saves()
        if adopted:
            saves = saves._replace(done=(*saves.done, adopted))
        text = with_saves(config_toml(config, comment=self.heading), saves)
        atomic_write_text(self.config_path, text, root=self.directory)

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
                    f"`{name}` is not finite as {dtype}; `{path.name}` was not saved",
                    hint="use `--save_precision bf16` or `float`, or lower `--learning_rate`",
                )
        files = self.forms(path)
        for file in files:
            tensors = state if file == path else comfy_state(state)
            save_lora(file, tensors, metadata, dtype=dtype, root=self.directory)
        self._replaced.discard()
        return files


def _without_ending(path: Path) -> str:
    """The name that a LoRA file and a state have in common."""
    return path.name.removesuffix(_STATE if path.name.endswith(_STATE) else _LORA)


_NAME = re.compile(r"(.+?)(?:-(step\d{8}|\d{6}))?\.safetensors")


class _Place(NamedTuple):
    """Where a file stands in training. `kind`: saved by step, by epoch, at the end; `number`: step or epoch."""

    run: str
    steps_done: int
    kind: int
    number: int


def run_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint of a run folder once: by steps done, and at equal ones step, epoch, final file.

    ComfyUI's twins under `comfy/` are taken only where there is nothing else (`--save_format comfy`). Where a file does
    not tell its steps (`--no_metadata`), files saved by step come first, then those by epoch, then the final one.
    Raises HyimgError for what is no folder or holds no LoRA file.
    """
    if not folder.is_dir():
        raise HyimgError(f"`{folder}` is not a folder", hint="name the `--output_dir` of a training")
    files = sorted(folder.glob("*.safetensors")) or sorted((folder / COMFY_FOLDER).glob("*.safetensors"))
    if not files:
        raise HyimgError(f"there is no LoRA file in `{folder}`", hint="name the `--output_dir` of a training")
    places = {path: _place(path) for path in files}
    if any(place.steps_done < 0 for place in places.values()):
        places = {path: place._replace(steps_done=0) for path, place in places.items()}
    return sorted(files, key=lambda path: places[path])


def _place(path: Path) -> _Place:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    run, number = found[1], found[2] or ""
    kind = 0 if number.startswith("step") else 1 if number else 2
    steps = read_header(path).metadata.get("ss_steps", "")
    return _Place(run, int(steps) if steps.isdecimal() else -1, kind, int(number.removeprefix("step") or 0))
