"""What is saved when, and which of the older files go: by step, by epoch, at the end, and when asked for.

A save writes the LoRA, then the state where one is wanted, and removes older ones last. So whenever the run
is killed, everything that was saved before is whole, and a state never stands without its LoRA.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from hyimg import __version__
from hyimg.config.commands import TrainConfig
from hyimg.errors import StoppedError
from hyimg.report import Reporter
from hyimg.training.identity import machine
from hyimg.training.run import Run
from hyimg.training.signals import StopRequest
from hyimg.training.state_folder import remove_state, write_state
from hyimg.training.state_tree import pack


def warn_of_idle_saving(config: TrainConfig, report: Reporter) -> None:
    """Says which of the options about saving have nothing to act on."""
    saving = config.saving
    by_step, by_epoch = saving.save_every_n_steps, saving.save_every_n_epochs or saving.save_n_epoch_ratio
    needs = {
        "save_last_n_steps": (by_step, "--save_every_n_steps"),
        "save_last_n_epochs": (by_epoch, "--save_every_n_epochs"),
        "save_last_n_steps_state": (by_step and saving.save_state, "--save_every_n_steps` and `--save_state"),
        "save_last_n_epochs_state": (
            by_epoch and saving.save_state,
            "--save_every_n_epochs` and `--save_state",
        ),
    }
    for name, (there, needed) in needs.items():
        if getattr(saving, name) is not None and not there:
            report.warning(f"`--{name}` has no effect without `{needed}`")


def save_after_step(run: Run) -> None:
    """The saves that are due after a step: every so many, and where the user asks for one by a file."""
    saving, every = run.config.saving, run.config.saving.save_every_n_steps
    asked = run.processes.is_main and run.folder.save_now_path.exists()
    due = every is not None and run.step % every == 0
    if due or asked:
        _save_step(run, state=saving.save_state or asked)
    if asked:
        run.folder.save_now_path.unlink(missing_ok=True)
    if due:
        _wait_for_main(run)


def save_after_epoch(run: Run) -> None:
    """The save that is due after an epoch; after the last one the final file is the same."""
    saving = run.config.saving
    every = saving.save_every_n_epochs
    if not every or run.epoch % every or run.step == run.schedule.max_steps:
        return
    run.save(epoch=run.epoch)
    if saving.save_state:
        save_state(run, run.folder.state_path(epoch=run.epoch))
    last = saving.save_last_n_epochs
    last_states = saving.save_last_n_epochs_state or last
    following = run.epoch + 1
    _rotate(
        run,
        "epoch",
        loras=last and following - every * last,
        states=last_states and following - every * last_states,
    )
    _wait_for_main(run)


def save_at_end(run: Run) -> None:
    """The final file, and the final state where states are wanted."""
    saving = run.config.saving
    run.save()
    if saving.save_state or saving.save_state_on_train_end:
        save_state(run, run.folder.state_path())


def stop_if_asked(run: Run, stop: StopRequest) -> None:
    """Ends a run that a signal asked to stop and that has steps left: saved, and with the way to go on.

    Raises StoppedError.
    """
    signal = run.exchange.agreed(stop.signal)
    if signal is None or run.step == run.schedule.max_steps:
        return
    _save_step(run, state=True)
    _wait_for_main(run)
    raise StoppedError(
        f"stopped by {'Ctrl-C' if signal.name == 'SIGINT' else signal.name} "
        f"after step {run.step} of {run.schedule.max_steps}",
        hint=f"go on with `hyimg train --config {shlex.quote(str(run.folder.config_path))} --resume latest`",
        signal_number=signal,
    )


def _save_step(run: Run, *, state: bool) -> None:
    """LoRA and state of the present step, unless they are saved already."""
    saving = run.config.saving
    if run.folder.lora_path(step=run.step).name not in [path.name for path in run.saved]:
        run.save(step=run.step)
    path = run.folder.state_path(step=run.step)
    if state and path not in run.saved_states:
        save_state(run, path)
    last = saving.save_last_n_steps
    last_states = saving.save_last_n_steps_state or last
    _rotate(run, "step", loras=last and run.step - last, states=last_states and run.step - last_states)


def save_state(run: Run, path: Path) -> None:
    """Saves everything that the run needs to go on from here, as the folder `path`; the main process does."""
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
        "step": run.step,
        "epoch": run.epoch,
        "batches_of_epoch": run.schedule.batches_done(after_step=run.step, ended=run.epoch),
        "identity": run.identity,
        "machine": machine(run.processes),
        "parts": trees,
    }
    write_state(path, document, tensors, run.metrics.text())
    run.saved_states.append(path)
    run.report.note(f"saved {path}")
    if run.uploads is not None:
        run.uploads.send_state(path)


def _rotate(run: Run, what: str, *, loras: int | None, states: int | None) -> None:
    """Removes the LoRA files and the states of epochs or steps below those numbers; None removes none."""
    if not run.processes.is_main:
        return
    if loras is not None:
        for path in run.folder.older(what, ending=".safetensors", than=loras):
            _wait_for_upload(run, path)
            path.unlink(missing_ok=True)
    if states is not None:
        for path in run.folder.older(what, ending="-state", than=states):
            _wait_for_upload(run, path)
            remove_state(path)


def _wait_for_main(run: Run) -> None:
    """Returns when the main process has saved and sent: here for as long as it takes, not in a sum that times out."""
    run.processes.wait()


def _wait_for_upload(run: Run, path: Path) -> None:
    if run.uploads is not None:
        run.uploads.wait_for(path)
