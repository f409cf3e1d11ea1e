"""`--resume DIR|latest`: which state a run goes on from, whether it may, and putting its parts back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyimg.errors import HyimgError, RunError
from hyimg.memory.processes import Processes
from hyimg.plugins import describe
from hyimg.report import Reporter
from hyimg.training.identity import differences, machine, machine_differences, option_differences
from hyimg.training.run_folder import RunFolder
from hyimg.training.state_folder import DamagedStateError, SavedState, read_state
from hyimg.training.state_tree import unpack

LATEST = "latest"


@dataclass(frozen=True)
class Stateful:
    """A part of a run that must go on where it was: `hyimg.training.run.Run.remember` takes it into states.

    `state_dict` gives dictionaries, lists and tuples of numbers, texts and tensors (`state_tree.pack`);
    `load_state_dict` takes the same, its tensors on the CPU and its own to keep.
    """

    name: str
    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], object]


@dataclass(frozen=True)
class Resumed:
    """The state that a run goes on from. `force` lets it go on where its settings are others."""

    saved: SavedState
    force: bool
    report: Reporter

    @property
    def step(self) -> int:
        """The last step that was done."""
        return int(self.saved.document["step"])

    @property
    def epoch(self) -> int:
        """The last epoch that was done, its files saved."""
        return int(self.saved.document["epoch"])

    @property
    def seed(self) -> int:
        return int(self.saved.document["seed"])

    @property
    def started(self) -> float:
        """When the run was started first, in seconds since the epoch."""
        return float(self.saved.document["started"])

    @property
    def log_name(self) -> str:
        """The name of the tracker's folder, which goes on."""
        return str(self.saved.document["log_name"])

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises HyimgError for options that would change the result; with `force` they are warned of."""
        self._judge(option_differences(self.saved.document["identity"]["options"], options))

    def check(self, identity: Mapping[str, Any], processes: Processes) -> None:
        """As `check_options`, for everything else that decides the result; also tells of another machine."""
        if self.step > identity["length"]:
            raise HyimgError(
                f"`{self.saved.path}` is of step {self.step}, and the run has {identity['length']}",
                hint="raise `--max_train_steps` or `--max_train_epochs`",
            )
        self._judge(differences(self.saved.document["identity"], identity))
        others = machine_differences(self.saved.document["machine"], machine(processes))
        if others:
            self.report.warning(f"rounding may differ from the state's: {', '.join(others)}")

    def _judge(self, found: list[str]) -> None:
        if found and not self.force:
            raise HyimgError(
                "\n  ".join([f"`{self.saved.path}` is the state of a run with other settings:", *found]),
                hint="give the settings that it had, or go on with these by `--resume_force`",
            )
        for line in found:
            self.report.warning(f"resumed with another setting: {line}")

    def restore(self, part: Stateful) -> None:
        """Puts one part back. Raises HyimgError where the state has no such part, or it does not fit."""
        trees = self.saved.document["parts"]
        if part.name not in trees:
            if not self.force:
                raise HyimgError(
                    f"`{self.saved.path}` holds no `{part.name}`, which this run has",
                    hint="give the settings that it had, or start that part anew by `--resume_force`",
                )
            self.report.warning(f"the state holds no `{part.name}`, which starts anew")
            return
        try:
            part.load_state_dict(unpack(trees[part.name], self.saved.tensors(part.name)))
        except HyimgError:
            raise
        except Exception as error:
            raise RunError(
                f"`{part.name}` cannot go on from `{self.saved.path}`: {describe(error)}",
                hint="`--traceback` shows where; other releases of the packages may have other states",
            ) from error


def find_state(
    given: str, folder: RunFolder, report: Reporter, *, overwrite: bool = False
) -> SavedState | None:
    """The state that `--resume` names: a folder, or the newest whole one of the run in `folder`.

    None where `latest` is asked for and the run has left nothing, or nothing that is not to be overwritten:
    so one command line starts a run and restarts it. Raises HyimgError where a named state is not whole or
    would be overwritten, or `latest` finds none.
    """
    if given != LATEST:
        state = read_state(Path(given))
        if overwrite and folder.holds(state.path):
            raise HyimgError(
                f"`--overwrite` would replace the run that `{given}` belongs to",
                hint="leave `--overwrite` out to go on in it, or choose another `--output_name`",
            )
        return state
    states = folder.states()
    found: list[SavedState] = []
    for path in states:
        try:
            found.append(read_state(path, verify=False))
        except DamagedStateError as error:
            report.warning(f"left out: {error.message}")
    for state in sorted(
        found, key=lambda state: (state.document["saved"], state.document["step"]), reverse=True
    ):
        try:
            return read_state(state.path)
        except DamagedStateError as error:
            report.warning(f"left out: {error.message}")
    if folder.saved_files() and not overwrite:
        raise HyimgError(
            f"there is no whole state of `{folder.name}` in `{folder.directory}`",
            hint="give `--resume` the folder of a state, or start anew with `--overwrite`",
        )
    report.warning(
        f"there is no state of `{folder.name}` in `{folder.directory}` yet: starting at the first step"
    )
    return None
