"""Saving: what is saved when (by step, by epoch, at the end, on request), which older files are removed, disk space.

A save is recorded in the run file, writes the LoRA, then the state if one is due, and removes older files last. So
a kill never damages an earlier save, and a run that resumes from a state first completes its save (`complete_save`).

The size of saves is compared with the free disk space before the first step and before each save.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from signal import Signals
from typing import NamedTuple

from torch import Tensor

from hyimg import __version__
from hyimg.cache.atomic import WriteError, explain_write
from hyimg.cache.own_files import remove_file, remove_tree
from hyimg.config.run_options import Saving
from hyimg.errors import RunError, StoppedError, first_few
from hyimg.report import Reporter, count_text, size_text
from hyimg.training.fingerprint import environment
from hyimg.training.resume import Resumed
from hyimg.training.run import Run
from hyimg.training.run_folder import RunFolder
from hyimg.training.state import METRICS, is_whole_state, pack, write_state
from hyimg.training.steps import Schedule

# Per tensor in a header and in a state's documents
_BYTES_A_NAME = 200


class SaveSizes(NamedTuple):
    """The bytes of a save: the LoRA in all its formats, and the state."""

    lora: int
    state: int


def lora_bytes(run: Run) -> int:
    """The bytes of a LoRA saved now, in all its formats."""
    tensors = run.network.state()
    own = (t.numel() * (t.element_size() if name.endswith(".dora_scale") else run.save_dtype.itemsize)
           for name, t in tensors.items())  # fmt: skip
    return (sum(own) + _BYTES_A_NAME * len(tensors)) * len(run.folder.forms(run.folder.lora_path()))


def tensor_bytes(parts: Iterable[Mapping[str, Tensor]]) -> int:
    """The bytes of a state of these tensors."""
    return sum(t.numel() * t.element_size() + _BYTES_A_NAME for part in parts for t in part.values())


def free_bytes(folder: Path) -> int | None:
    """The free bytes in a folder, possibly one still to be created; None if the file system does not report them."""
    try:
        usage = shutil.disk_usage(_nearest(folder))
    except OSError:
        return None
    # some network and memory file systems report zeros, or more free than there is
    return usage.free if 0 < usage.total >= usage.free >= 0 else None


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raises WriteError if fewer than `num_bytes` are free in `folder`; `what` is to be written."""
    free = free_bytes(folder)
    if free is not None and num_bytes > free:
        raise WriteError(
            f"the disk is too full: {what} needs {size_text(num_bytes)}, and {size_text(free)} are free in `{folder}`",
            remedy="free some space",
        )


def check_space_of_run(run: Run) -> None:
    """Before the first step: raises WriteError if the first save does not fit, and warns if not all saves do.

    States may be larger: an optimiser has no state before its first step.
    """
    if not run.processes.is_main:
        return
    state = tensor_bytes(pack(part.state_dict())[1] for part in run.parts)
    sizes, saving = SaveSizes(lora_bytes(run), state), run.config.saving
    has_states = saving.save_state or saving.save_state_on_train_end
    first = _by_disk(run, sizes.lora, sizes.state if has_states else 0)
    for folder, num_bytes in first.items():
        require_space(folder, num_bytes, "a save")
    loras, states = _numbers_kept(run)
    if run.resumed is not None or run.config.saving.overwrite:
        return  # existing files are removed as new ones come
    for folder, num_bytes in _by_disk(run, loras * sizes.lora, states * sizes.state).items():
        free = free_bytes(folder)
        if free is not None and num_bytes > free:
            run.report.warning(
                f"the saves of this run need {size_text(num_bytes)} or more, and {size_text(free)} are free in "
                f"`{folder}`: `--save_last_n_steps` or `--save_last_n_epochs` keep fewer"
            )


def _numbers_kept(run: Run) -> tuple[int, int]:
    """The maximum number of LoRAs and states at a time: the newest is written before the oldest is removed."""
    saving, schedule = run.config.saving, run.schedule
    every, at = saving.save_every_n_steps, [n for n in saving.save_at_steps if n <= schedule.max_steps]
    by_step = (
        schedule.max_steps // every if every else 0,
        saving.save_last_n_steps,
        saving.save_last_n_steps_state,
    )
    every_epoch = saving.save_every_n_epochs
    epochs = (schedule.max_steps - 1) // schedule.steps_per_epoch
    by_epoch = (
        epochs // every_epoch if every_epoch else 0,
        saving.save_last_n_epochs,
        saving.save_last_n_epochs_state,
    )
    loras = states = 1  # the final ones
    for (number, last, last_states), unit in ((by_step, every or 1), (by_epoch, 1)):
        loras += min(number, last // unit + 2) if last else number
        last_states = last_states or last
        states += min(number, last_states // unit + 2) if last_states else number
    if not saving.save_state:
        states = 1 if saving.save_state_on_train_end else 0
    return loras + len(at), states


def _by_disk(run: Run, lora: int, state: int) -> dict[Path, int]:
    """The bytes for each folder, or their sum for the first if both are on one disk."""
    folder, states = run.folder.directory, run.folder.states_directory
    if states == folder or _device(folder) == _device(states):
        return {folder: lora + state}
    return {folder: lora, states: state}


def _device(folder: Path) -> int:
    return os.stat(_nearest(folder)).st_dev


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def is_finished(resumed: Resumed, folder: RunFolder, saving: Saving, schedule: Schedule) -> bool:
    """Whether the run of that state is finished: no step is left and its final files exist."""
    wants_state = saving.save_state or saving.save_state_on_train_end
    return (
        resumed.step == schedule.max_steps
        and all(path.is_file() for path in folder.forms(folder.lora_path()))
        and (not wants_state or is_whole_state(folder.state_path()))
    )


def warn_of_unreached_saves(saving: Saving, num_steps: int, report: Reporter) -> None:
    """Warns of `--save_at_steps` beyond the end of the run."""
    past = [str(step) for step in sorted(set(saving.save_at_steps)) if step > num_steps]
    if past:
        report.warning(
            f"`--save_at_steps`: the run ends after {count_text(num_steps, 'step')}, before {first_few(past)}"
        )


def save_after_step(run: Run) -> None:
    """The saves due after a step: every so many, those listed, and one that the user requests by a file."""
    saving, every = run.config.saving, run.config.saving.save_every_n_steps
    requested = run.processes.is_main and os.path.lexists(run.folder.save_now_path)
    due = (every is not None and run.step % every == 0) or run.step in saving.save_at_steps
    if due or requested:
        _save_step(run, state=saving.save_state or requested)
    if requested:
        remove_file(run.folder.save_now_path, root=run.folder.directory)
    if due:
        _wait_for_main(run)


def save_after_epoch(run: Run) -> None:
    """The save due after an epoch, except the last one, which equals the final file."""
    saving = run.config.saving
    every = saving.save_every_n_epochs
    if not every or run.epoch % every or run.step == run.schedule.max_steps:
        return
    _save(run, epoch=run.epoch, state=saving.save_state)
    _rotate_epochs(run, run.epoch)
    _wait_for_main(run)


def save_at_end(run: Run) -> None:
    """The final file, and the final state if requested."""
    saving = run.config.saving
    _save(run, state=saving.save_state or saving.save_state_on_train_end)


def complete_save(run: Run) -> None:
    """Completes the save of a run's own state after a resume: a kill may have prevented the LoRA next to the state, and
    the removal of older files."""
    if run.resumed is None or not run.folder.holds(run.resumed.saved.path):
        return
    epoch, step = run.folder.place_of(run.resumed.saved.path)
    missing = run.processes.is_main and not all(
        path.is_file() for path in run.folder.forms(run.folder.lora_path(epoch=epoch, step=step))
    )
    if missing and (epoch, step) != (None, None):
        run.save(epoch=epoch, step=step)
    if epoch is not None:
        _rotate_epochs(run, epoch)
    elif step is not None:
        _rotate_steps(run, step)


def stop_if_requested(run: Run, signal: Signals | None) -> None:
    """After a stop signal, saves and raises StoppedError with the command to resume, unless no step is left."""
    if signal is None or run.step == run.schedule.max_steps:
        return
    _save_step(run, state=True)
    _wait_for_main(run)
    raise StoppedError(
        f"stopped by {'Ctrl-C' if signal.name == 'SIGINT' else signal.name} "
        f"after step {run.step} of {run.schedule.max_steps}",
        hint=f"resume with {_command(run, '--resume latest')}",
        signal_number=signal,
    )


def resumable_error(run: Run, error: WriteError | OSError, logging_dir: Path) -> RunError:
    """A failed write as an error with the command to continue; an OSError comes from a tracker in `logging_dir`."""
    if isinstance(error, OSError):
        explained = explain_write(error, logging_dir, logging_dir)
        error = explained if isinstance(explained, WriteError) else WriteError(explained.message)
    before = f"{error.remedy}, then " if error.remedy is not None else ""
    return RunError(error.message, hint=f"{before}{_way_on(run)}; earlier saves are intact")


def _way_on(run: Run) -> str:
    """The command that resumes the run, or restarts it if it has no state."""
    folder = run.folder
    if not folder.config_path.is_file():
        return "run the same command again"
    can_resume = any(is_whole_state(state) for state in folder.states())
    restarts = can_resume or not folder.saved_files(complete=True)
    return f"continue with {_command(run, '--resume latest' if restarts else '--overwrite')}"


def _command(run: Run, option: str) -> str:
    return f"`hyimg train --config {shlex.quote(str(run.folder.config_path))} {option}`"


def _save_step(run: Run, *, state: bool) -> None:
    """LoRA and state of the current step, unless already saved."""
    lora = run.folder.lora_path(step=run.step).name not in [path.name for path in run.saved]
    state = state and run.folder.state_path(step=run.step) not in run.saved_states
    _save(run, step=run.step, lora=lora, state=state)
    _rotate_steps(run, run.step)


def _save(
    run: Run, *, epoch: int | None = None, step: int | None = None, lora: bool = True, state: bool
) -> None:
    """The LoRA and the state of an epoch, of a step, or the final ones; recorded in the run file before and after."""
    if run.processes.is_main and (lora or state):
        run.folder.begin_save(epoch=epoch, step=step, state=state)
    if lora and run.processes.is_main:
        path = run.folder.lora_path(epoch=epoch, step=step)
        require_space(run.folder.directory, lora_bytes(run), f"`{path.name}`")
    if lora:
        run.save(epoch=epoch, step=step)
    if state:
        save_state(run, run.folder.state_path(epoch=epoch, step=step))
    if run.processes.is_main and (lora or state):
        run.folder.end_save()


def save_state(run: Run, path: Path) -> None:
    """Saves everything needed to resume from here in the folder `path`; only the main process writes."""
    if not run.processes.is_main:
        return
    trees, tensors = {}, {}
    for part in run.parts:
        trees[part.name], tensors[part.name] = pack(part.state_dict())
    document = {
        "hyimg": __version__,
        "saved": time.time(),
        "started": run.started,
        "log_name": run.log_name,
        "seed": run.seed,
        **({"validation_seed": run.validation_seed} if run.validation_seed is not None else {}),
        "step": run.step,
        "epoch": run.epoch,
        "batches_of_epoch": run.schedule.batches_done(after_step=run.step, ended=run.epoch),
        "identity": run.fingerprint,
        "machine": environment(run.processes),
        "parts": trees,
        METRICS: run.metrics.position,
    }
    require_space(path.parent, tensor_bytes(tensors.values()), f"`{path.name}`")
    write_state(path, document, tensors, root=run.folder.root_of(path))
    run.saved_states.append(path)
    run.report.note(f"saved {path}")
    if run.uploads is not None:
        run.uploads.send_state(path)


def _rotate_steps(run: Run, step: int) -> None:
    last = run.config.saving.save_last_n_steps
    last_states = run.config.saving.save_last_n_steps_state or last
    _rotate(run, "step", loras=last and step - last, states=last_states and step - last_states)


def _rotate_epochs(run: Run, epoch: int) -> None:
    saving = run.config.saving
    every, last = saving.save_every_n_epochs or 1, saving.save_last_n_epochs
    last_states = saving.save_last_n_epochs_state or last
    following = epoch + 1
    _rotate(
        run,
        "epoch",
        loras=last and following - every * last,
        states=last_states and following - every * last_states,
    )


def _rotate(run: Run, what: str, *, loras: int | None, states: int | None) -> None:
    """Removes LoRA files and states of epochs or steps below these numbers; None removes none."""
    if not run.processes.is_main:
        return
    if loras is not None:
        listed = [run.folder.lora_path(step=step).name for step in run.config.saving.save_at_steps]
        for path in run.folder.older(what, ending=".safetensors", than=loras):
            if path.name in listed:
                continue
            _wait_for_upload(run, path)
            remove_file(path, root=run.folder.root_of(path))
    if states is not None:
        for path in run.folder.older(what, ending="-state", than=states):
            _wait_for_upload(run, path)
            remove_tree(path, root=run.folder.root_of(path))


def _wait_for_main(run: Run) -> None:
    """Waits until the main process has saved and uploaded: here without a limit, not in a reduction that times out."""
    run.processes.wait()


def _wait_for_upload(run: Run, path: Path) -> None:
    if run.uploads is not None:
        run.uploads.wait_for(path)
