"""TensorBoard and Weights & Biases, through accelerate: which a run has, and how each goes on when it is resumed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from hyimg.config.commands import TrainConfig
from hyimg.config.load import flatten, secrets_of
from hyimg.config.run import Logging
from hyimg.errors import HyimgError
from hyimg.memory.processes import Processes
from hyimg.randomness import keyed_seed
from hyimg.report import Reporter

if TYPE_CHECKING:
    from hyimg.training.resume import Resumed

TENSORBOARD, WANDB = "tensorboard", "wandb"


def tracker_names(logging: Logging) -> list[str]:
    """The trackers that `--log_with` names."""
    return {None: [], "all": [TENSORBOARD, WANDB]}.get(logging.log_with, [str(logging.log_with)])


def check_trackers(logging: Logging, report: Reporter) -> None:
    """Raises HyimgError where W&B is asked for and is not installed, or will not let this user in."""
    if WANDB not in tracker_names(logging):
        for name in ("wandb_run_name", "wandb_api_key"):
            if getattr(logging, name) is not None:
                report.warning(f"`--{name}` has no effect without `--log_with wandb`")
        return
    if not Processes.current().is_main:
        return
    if importlib.util.find_spec(WANDB) is None:
        raise HyimgError(
            f"`--log_with {logging.log_with}` needs the package wandb", hint='`pip install "hyimg[wandb]"`'
        )
    if logging.wandb_api_key is not None:
        os.environ["WANDB_API_KEY"] = logging.wandb_api_key
    import wandb

    # what WANDB_MODE, `wandb offline` and the like have come to
    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise HyimgError(
            f"W&B does not let this run in: {_one_line(error)}",
            hint="run `wandb login`, or set `WANDB_MODE=offline` and send the run later with `wandb sync`",
        ) from error


@dataclass(frozen=True)
class TrackedRun:
    """What the trackers of a run are told of it: its name, where they write, and when it was started first.

    `started` is in seconds since the epoch; `resumed` is the state that the run goes on from.
    """

    config: TrainConfig
    log_name: str
    directory: Path
    started: float
    resumed: Resumed | None

    @property
    def wandb_id(self) -> str:
        """W&B's ID of the run: from its first start, to the microsecond, so that it stays when it is resumed."""
        return f"{keyed_seed('wandb', self.started):016x}"


def start_trackers(accelerator: Accelerator, run: TrackedRun, report: Reporter) -> None:
    """Starts the main process's trackers, those that the accelerator was made for.

    Raises HyimgError where W&B cannot be started.
    """
    names = tracker_names(run.config.logging)
    if not names or not accelerator.is_main_process:
        return
    logging = run.config.logging
    options = {k: _shown(v) for k, v in flatten(run.config).items()} if logging.log_config else None
    arguments: dict[str, dict[str, Any]] = {}
    if TENSORBOARD in names and run.resumed is not None:
        # what was logged after the state that the run goes on from is hidden
        arguments[TENSORBOARD] = {"purge_step": run.resumed.step + 1}
    if WANDB in names:
        arguments[WANDB] = _wandb_arguments(run)
    try:
        with _hidden_from_arguments(secrets_of(run.config)):
            accelerator.init_trackers(logging.log_tracker_name, config=options, init_kwargs=arguments)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != WANDB:
            raise
        raise HyimgError(
            f"W&B cannot be started: {_one_line(error)}",
            hint="set `WANDB_MODE=offline`, and send the run later with `wandb sync`",
        ) from error
    if WANDB in names:
        _tell(accelerator.get_tracker(WANDB, unwrap=True), run, report)


def show_images(accelerator: Accelerator, images: Sequence[tuple[int, Path]], step: int) -> None:
    """Gives pictures, by the number of their prompt, to the trackers that take some."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
        for number, path in images:
            pixels_1HWC = np.asarray(Image.open(path))[None]
            tracker.log_images({f"sample/{number}": pixels_1HWC}, step=step, **layout)


def _wandb_arguments(run: TrackedRun) -> dict[str, Any]:
    """How `wandb.init` is called; its project comes from accelerate."""
    import wandb

    run.directory.mkdir(parents=True, exist_ok=True)  # else it writes into a temporary folder
    return {
        "name": run.config.logging.wandb_run_name or run.log_name,
        "id": run.wandb_id,
        "resume": "allow" if run.resumed is not None else None,
        "dir": str(run.directory),
        # what it would keep of the console is in the metrics, and the terminal is the progress display's
        "settings": wandb.Settings(silent=True, console="off"),
    }


def _tell(started: Any, run: TrackedRun, report: Reporter) -> None:
    """Where W&B's run is and, of a resumed one, whether it is the one from before."""
    if started.disabled:
        return
    if started.offline:
        report.note(f"W&B: offline, in {run.directory}; `wandb sync` sends it")
        if run.resumed is not None:
            report.warning(
                "W&B cannot go on in a run while it is offline: what follows is a folder of its own with the same "
                f"run ID `{run.wandb_id}`; `wandb sync` joins the folders in their order"
            )
        return
    report.note(f"W&B: {started.url}")
    if run.resumed is not None and not started.resumed:
        report.warning(f"W&B has no run `{run.wandb_id}` to go on in: what follows is a run of its own")


@contextmanager
def _hidden_from_arguments(secrets: Sequence[str]) -> Iterator[None]:
    """A block in which the process's arguments show no secret: W&B keeps them with the run."""
    before = sys.argv
    hidden = list(before)
    for secret in secrets:
        hidden = [word.replace(secret, "***") for word in hidden]
    sys.argv = hidden
    try:
        yield
    finally:
        sys.argv = before


def _shown(value: object) -> str:
    """An option's value as trackers get it: of a path only the name, since a log may be seen by many."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return value.name if isinstance(value, Path) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
