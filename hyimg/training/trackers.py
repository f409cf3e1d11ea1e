"""TensorBoard and Weights & Biases, through accelerate: which of them a run uses, and how each is resumed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from hyimg.config.commands import TrainConfig
from hyimg.config.image_file import opened_image
from hyimg.config.load import flatten, secrets_of
from hyimg.config.run_options import Logging
from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError
from hyimg.randomness import keyed_seed
from hyimg.report import Reporter

TENSORBOARD, WANDB = "tensorboard", "wandb"


def tracker_names(logging: Logging) -> list[str]:
    """The trackers that `--log_with` names."""
    return {None: [], "all": [TENSORBOARD, WANDB]}.get(logging.log_with, [str(logging.log_with)])


def check_trackers(logging: Logging) -> None:
    """Raises HyimgError where a tracker's package is not installed, or the W&B login fails."""
    names = tracker_names(logging)
    if not Processes.current().is_main:
        return
    for name, install in ((TENSORBOARD, "tensorboard"), (WANDB, '"hyimg[wandb]"')):
        # accelerate skips a tracker silently where its package is missing
        if name in names and importlib.util.find_spec(name) is None:
            raise HyimgError(
                f"`--log_with {logging.log_with}` needs the package {name}", hint=f"`pip install {install}`"
            )
    if WANDB in names:
        _log_in(logging)


def _log_in(logging: Logging) -> None:
    """Logs in to W&B if it is online; raises HyimgError if that fails."""
    if logging.wandb_api_key is not None:
        os.environ["WANDB_API_KEY"] = logging.wandb_api_key
    try:
        import wandb
    except Exception as error:  # one of its dependencies may have an incompatible version
        raise HyimgError(
            f"the package wandb cannot be imported: {_one_line(error)}",
            hint='reinstall it: `pip install --upgrade "hyimg[wandb]"`',
        ) from error
    # the outcome of WANDB_MODE, `wandb offline` and the like
    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise HyimgError(
            f"W&B login failed: {_one_line(error)}",
            hint="run `wandb login`, or set `WANDB_MODE=offline` and upload the run later with `wandb sync`",
        ) from error


@dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers see it: its name, the folder they write to, and the time of its first start.

    `started` is in seconds since the epoch; `resumed_step` is the step that a resumed run continues from.
    """

    config: TrainConfig
    log_name: str
    directory: Path
    started: float
    resumed_step: int | None

    @property
    def wandb_id(self) -> str:
        """W&B's run ID, derived from the first start to the microsecond, so that a resumed run keeps it."""
        return f"{keyed_seed('wandb', self.started):016x}"


def start_trackers(accelerator: Accelerator, run: TrackedRun, report: Reporter) -> None:
    """Starts the trackers of the accelerator in the main process. Raises HyimgError if W&B cannot be started."""
    names = tracker_names(run.config.logging)
    if not names or not accelerator.is_main_process:
        return
    logging = run.config.logging
    options = {k: _shown(v) for k, v in flatten(run.config).items()} if logging.log_config else None
    arguments: dict[str, dict[str, Any]] = {}
    if TENSORBOARD in names and run.resumed_step is not None:
        # hides what was logged after the state that the run resumes from
        arguments[TENSORBOARD] = {"purge_step": run.resumed_step + 1}
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
            hint="set `WANDB_MODE=offline` and upload the run later with `wandb sync`",
        ) from error
    if WANDB in names:
        _report_wandb(accelerator.get_tracker(WANDB, unwrap=True), run, report)


def log_images(accelerator: Accelerator, images: Sequence[tuple[int, Path]], step: int) -> None:
    """Logs images, given with the number of their prompt, to all trackers."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
        for number, path in images:
            with opened_image(path) as image:
                pixels_1HWC = np.asarray(image)[None]
            tracker.log_images({f"sample/{number}": pixels_1HWC}, step=step, **layout)


def _wandb_arguments(run: TrackedRun) -> dict[str, Any]:
    """The arguments of `wandb.init`; accelerate passes the project."""
    import wandb

    run.directory.mkdir(parents=True, exist_ok=True)  # otherwise it writes to a temporary folder
    return {
        "name": run.config.logging.wandb_run_name or run.log_name,
        "id": run.wandb_id,
        "resume": "allow" if run.resumed_step is not None else None,
        "dir": str(run.directory),
        # no console capture: it would disturb the progress display; no git: it runs commands that the configuration
        # of a repository in the working folder names
        "settings": wandb.Settings(silent=True, console="off", disable_git=True),
    }


def _report_wandb(started: Any, run: TrackedRun, report: Reporter) -> None:
    """Reports where the W&B run is and, when resumed, whether it is the earlier one."""
    if started.disabled:
        return
    if started.offline:
        report.note(f"W&B: offline, in {run.directory}; `wandb sync` uploads it")
        if run.resumed_step is not None:
            report.warning(
                "W&B cannot resume a run offline: this part goes to a separate folder with the same run ID "
                f"`{run.wandb_id}`; `wandb sync` merges the folders if given in order"
            )
        return
    report.note(f"W&B: {started.url}")
    if run.resumed_step is not None and not started.resumed:
        report.warning(f"W&B has no run `{run.wandb_id}` to resume: it starts a new one")


@contextmanager
def _hidden_from_arguments(secrets: Sequence[str]) -> Iterator[None]:
    """A block in which `sys.argv` contains no secret: W&B stores the arguments with the run."""
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
    """An option's value for trackers: of a path only the name, since logs may be public."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return value.name if isinstance(value, Path) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
