"""The training loop, in the order in which things happen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from hyimg.data.training_data import LoadedBatch
from hyimg.lora.max_norm import limit_norms
from hyimg.report import Task
from hyimg.training.exchange import StepTally
from hyimg.training.nonfinite import StepImages
from hyimg.training.run import Run
from hyimg.training.saving import save_after_epoch, save_after_step, save_at_end, stop_if_asked
from hyimg.training.signals import StopRequest
from hyimg.training.step_metrics import StepCost, live_text
from hyimg.training.steps import Epoch, Step


class StepResult(NamedTuple):
    """The loss of each of a step's images (float32, on the CPU), their timesteps (0..1000), and the norm of its
    gradient before clipping.

    A step that was not `taken` has left the weights as they were: its loss or gradient was not finite.
    """

    loss_B: Tensor
    timesteps: list[float]
    gradient_norm: float
    taken: bool


def train_loop(run: Run) -> None:
    """Trains from where the run stands to its last step; saves and reports on the way.

    Saving is the last thing that is done with a step, so that a run which goes on from a state repeats none
    of the others. Raises `RunError` where a loss or gradient is not finite, and StoppedError after a signal;
    the files saved before stay.
    """
    notify, schedule = run.plugins.notify, run.schedule
    notify("hyimg_run_start", run=run)
    progress = run.report.task("train", schedule.max_steps, unit="step", done=run.step)
    cost = StepCost(run.accelerator.device, schedule.max_steps - run.step)
    with progress as task, StopRequest(run.report) as stop:
        if run.step == 0:
            run.evaluation.at_start(run)
        for epoch in schedule.epochs(after_step=run.step, ended=run.epoch):
            rank, world = run.processes.rank, run.processes.world
            batches = run.loader.load(epoch.share(rank, world), epoch=epoch.number)
            for step in epoch.steps:
                started = time.perf_counter()
                result = train_step(run, step, epoch, islice(batches, len(step.share(rank, world))))
                run.step = step.number
                notify("hyimg_step_end", run=run, step=step.number, loss_B=result.loss_B)
                seconds = time.perf_counter() - started
                _log(run, task, epoch, result, cost.of_step(len(result.loss_B), seconds))
                run.evaluation.after_step(run)
                save_after_step(run)
                stop_if_asked(run, stop)
            if epoch.complete:
                run.epoch = epoch.number
                run.evaluation.after_epoch(run)
                save_after_epoch(run)
                notify("hyimg_epoch_end", run=run, epoch=epoch.number)
                stop_if_asked(run, stop)
        save_at_end(run)
    notify("hyimg_run_end", run=run)


def train_step(run: Run, step: Step, epoch: Epoch, batches: Iterable[LoadedBatch]) -> StepResult:
    """One optimiser step.

    The gradient is the sum over the step's images divided by their number, whatever the batches' sizes and
    whichever process has shown them; `batches` are this process's share, loaded.
    """
    shown = StepTally(step)
    own = step.share(run.processes.rank, run.processes.world)
    for number, batch in zip(own, batches, strict=True):
        run.network.set_multiplier(batch.network_multiplier)
        run.network.set_dropout_key(run.seed, step.number, number, num_images=len(batch.sample_keys))
        loss_B, sigma_B = run.objective(batch, epoch.number)
        _backward(run, loss_B, step)
        shown.add(number, loss_B.detach(), sigma_B)
        for preservation_B in run.preservation.losses(batch, epoch.number):
            _backward(run, preservation_B, step)
            shown.add_preservation(preservation_B.detach())
    run.network.set_dropout_key(None)
    totals = run.exchange.totals(shown, run.stepper.parameters)
    loss_B, timesteps = totals.loss_B, (totals.sigma_B * 1000).tolist()
    kept = bool(run.preservation.terms)
    run.measured = {"loss_preservation": totals.preservation / step.num_samples} if kept else {}
    norm = run.stepper.gradient_norm()
    if bool(torch.isfinite(loss_B).all()) and run.stepper.overflowed(norm):
        # the loss was scaled too high for the precision, which the scaler mends: no failure
        run.stepper.skip()
        return StepResult(loss_B, timesteps, norm, taken=False)
    keys = [key for batch in step.batches for key in run.loader.keys(batch)]
    images = StepImages(keys, timesteps, loss_B)
    taken = run.guard.admits(
        step.number, images, norm, run.network, last_good=run.last_good, report=run.report
    )
    if taken:
        run.stepper.step()
        _follow_up(run)
    else:
        run.stepper.skip()
    return StepResult(loss_B, timesteps, norm, taken)


def _backward(run: Run, loss_B: Tensor, step: Step) -> None:
    if loss_B.requires_grad:  # module dropout may have left out every adapter
        run.stepper.backward(loss_B.sum() / step.num_samples)


def _follow_up(run: Run) -> None:
    """What follows the optimiser: the norms' limit, then the moving average."""
    if max_norm := run.config.network_training.scale_weight_norms:
        run.measured |= limit_norms(run.network, max_norm).metrics()
    if run.ema is not None:
        run.ema.update()


def _log(run: Run, task: Task, epoch: Epoch, result: StepResult, cost: Mapping[str, float]) -> None:
    values = run.losses.add(result.loss_B, result.timesteps, taken=result.taken)
    values |= {"gradient_norm": result.gradient_norm if result.taken else math.nan}
    values |= run.measured | run.stepper.told
    counts = {"samples": len(result.loss_B)}
    run.metrics.write({"step": run.step, "epoch": epoch.number, **values, **counts, **cost})
    values |= cost
    run.accelerator.log({k: v for k, v in values.items() if math.isfinite(v)}, step=run.step)
    task.advance(detail=live_text(values, epoch.number, run.schedule.num_epochs))
