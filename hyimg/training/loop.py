"""The training loop, in the order in which things happen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from hyimg.data.training_data import LoadedBatch
from hyimg.errors import RunError
from hyimg.lora.max_norm import limit_norms
from hyimg.report import Task
from hyimg.training.metrics import MovingAverage
from hyimg.training.run import Epoch, Run, Step


def train_loop(run: Run) -> None:
    """Trains from the run's first step to its last; saves and reports on the way.

    Raises `RunError` where a loss or gradient is not finite; the files saved before stay.
    """
    notify, saving = run.plugins.notify, run.config.saving
    notify("hyimg_run_start", run=run)
    average = MovingAverage()
    with run.report.task("train", run.schedule.max_steps, unit="step") as task:
        for epoch in run.schedule.epochs():
            batches = run.loader.load(epoch.batches, epoch=epoch.number)
            for step in epoch.steps:
                started = time.perf_counter()
                loss_B, gradient_norm = train_step(run, step, epoch, islice(batches, len(step.batches)))
                run.step = step.number
                notify("hyimg_step_end", run=run, step=step.number, loss_B=loss_B)
                _log(run, task, epoch, loss_B, gradient_norm, average, time.perf_counter() - started)
                if saving.save_every_n_steps and step.number % saving.save_every_n_steps == 0:
                    run.save(step=step.number)
            if epoch.complete:
                run.epoch = epoch.number
                # after the last epoch the final file is the same
                is_last = run.step == run.schedule.max_steps
                if (
                    saving.save_every_n_epochs
                    and epoch.number % saving.save_every_n_epochs == 0
                    and not is_last
                ):
                    run.save(epoch=epoch.number)
                notify("hyimg_epoch_end", run=run, epoch=epoch.number)
    run.save()
    notify("hyimg_run_end", run=run)


def train_step(run: Run, step: Step, epoch: Epoch, batches: Iterable[LoadedBatch]) -> tuple[Tensor, float]:
    """One optimiser step: (loss of each of its images, norm of the gradient before clipping).

    The gradient is the sum over the step's images divided by their number, whatever the batches' sizes.
    """
    losses, kept = [], []
    for number, batch in enumerate(batches):
        run.network.set_multiplier(batch.network_multiplier)
        run.network.set_dropout_key(run.seed, step.number, number)
        loss_B, _ = run.objective(batch, epoch.number)
        _backward(loss_B, step)
        losses.append(loss_B.detach())
        for preservation_B in run.preservation.losses(batch, epoch.number):
            _backward(preservation_B, step)
            kept.append(preservation_B.detach())
    run.network.set_dropout_key(None)
    loss_B = torch.cat(losses).float().cpu()
    run.measured = {"loss_preservation": float(torch.cat(kept).sum()) / step.num_samples} if kept else {}
    max_norm = run.config.optimizer.max_grad_norm or math.inf
    gradient_norm = float(torch.nn.utils.clip_grad_norm_(run.parameters, max_norm))
    if not (math.isfinite(gradient_norm) and bool(torch.isfinite(loss_B).all())):
        raise RunError(
            f"the loss or its gradient is not finite at step {step.number} (loss {loss_B.mean():g})",
            hint="lower `--learning_rate`; files that were saved before are whole"
            if step.number > 1
            else "at the first step that comes of the model, the caches or `--network_weights`: check those files",
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    _follow_up(run)
    return loss_B, gradient_norm


def _backward(loss_B: Tensor, step: Step) -> None:
    if loss_B.requires_grad:  # module dropout may have left out every adapter
        torch.autograd.backward(loss_B.sum() / step.num_samples)


def _follow_up(run: Run) -> None:
    """What follows the optimiser: the norms' limit, then the moving average."""
    if max_norm := run.config.network_training.scale_weight_norms:
        run.measured |= limit_norms(run.network, max_norm).metrics()
    if run.ema is not None:
        run.ema.update()


def _log(
    run: Run,
    task: Task,
    epoch: Epoch,
    loss_B: Tensor,
    gradient_norm: float,
    average: MovingAverage,
    seconds: float,
) -> None:
    loss = float(loss_B.mean())
    smoothed = average.add(loss)
    values: dict[str, float] = {"loss": loss, "loss_smoothed": smoothed, "gradient_norm": gradient_norm}
    values |= run.measured
    # an optimiser that makes its own rate (Adafactor) has none to tell
    rates = [float(group["lr"]) for group in run.optimizer.param_groups if group["lr"] is not None]
    values |= {f"learning_rate_{i}" if i else "learning_rate": rate for i, rate in enumerate(rates)}
    counts = {"samples": len(loss_B), "seconds": round(seconds, 6)}
    run.metrics.write({"step": run.step, "epoch": epoch.number, **values, **counts})
    run.accelerator.log(values, step=run.step)
    task.advance(detail=f"epoch {epoch.number}/{run.schedule.num_epochs}, loss {smoothed:.4f}")
