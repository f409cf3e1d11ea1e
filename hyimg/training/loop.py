"""The training loop: batches, loss, backward, clip, step, then logging, evaluation and saving.

Several processes: each computes its share of a step's batches; then gradients, losses and noise levels are summed
over all of them, and every process takes the same optimiser step. Weights and optimiser thus stay equal without
being sent, and N processes do what one does with N times the accumulation.

Ctrl-C, SIGTERM and SIGHUP: the first stops the loop after its step, saved; the second stops at once.

Shapes: B images of a step, P parameters
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyimg.data.batches import LoadedBatch
from hyimg.distributed.collectives import sum_over_processes
from hyimg.distributed.processes import STOP_SIGNALS, Processes, is_repetition, stop_signals
from hyimg.errors import Terminated
from hyimg.hookspecs import TrainingRun
from hyimg.lora.network import limit_norms
from hyimg.report import Reporter, Task
from hyimg.training.evaluation import Evaluation
from hyimg.training.metrics import StepCost, live_text
from hyimg.training.run import Run
from hyimg.training.saving import (
    complete_save,
    save_after_epoch,
    save_after_step,
    save_at_end,
    stop_if_requested,
)
from hyimg.training.steps import Epoch, Step


class StepResult(NamedTuple):
    """The losses of a step's images (float32, on the CPU), their timesteps (0..1000), and the gradient norm before
    clipping.

    If not `taken`, the loss or gradient was not finite and the weights have not changed.
    """

    loss_B: Tensor
    timesteps: list[float]
    gradient_norm: float
    taken: bool


def train_loop(run: Run, evaluation: Evaluation) -> None:
    """Trains from the run's current step to its last, logging, evaluating and saving on the way.

    Saving comes last in each step, so that a resumed run repeats nothing. Raises RunError for a loss or gradient
    that is not finite, and StoppedError after a signal; files saved earlier stay.
    """
    notify, schedule, processes = run.plugins.notify, run.schedule, run.processes
    for_plugins: TrainingRun = run
    notify("hyimg_run_start", run=for_plugins)
    complete_save(run)
    progress = run.report.task("train", schedule.max_steps, unit="step", done=run.step)
    cost = StepCost(run.device, schedule.max_steps - run.step)
    with progress as task, StopRequest(run.report) as stop:
        if run.step == 0:
            evaluation.at_start(run)
        for epoch in schedule.epochs(after_step=run.step, ended=run.epoch):
            for step, batches in _loaded(run, epoch):
                started = time.perf_counter()
                result = train_step(run, step, batches, epoch=epoch.number)
                run.step = step.number
                notify("hyimg_step_end", run=for_plugins, step=step.number, loss_B=result.loss_B)
                seconds = time.perf_counter() - started
                _log(run, task, epoch.number, result, cost.of_step(len(result.loss_B), seconds))
                evaluation.after_step(run)
                save_after_step(run)
                stop_if_requested(run, any_rank_signal(stop.signal, processes, run.device))
            if epoch.complete:
                run.epoch = epoch.number
                evaluation.after_epoch(run)
                save_after_epoch(run)
                notify("hyimg_epoch_end", run=for_plugins, epoch=epoch.number)
                stop_if_requested(run, any_rank_signal(stop.signal, processes, run.device))
        save_at_end(run)
    notify("hyimg_run_end", run=for_plugins)


def _loaded(run: Run, epoch: Epoch) -> Iterator[tuple[Step, Iterable[LoadedBatch]]]:
    """The steps of an epoch, each with this process's share of its batches, which are read as they are iterated."""
    rank, world = run.processes.rank, run.processes.world
    share = [step.batches[index] for step in epoch.steps for index in step.share(rank, world)]
    batches = run.loader.load(share, epoch=epoch.number)
    for step in epoch.steps:
        yield step, islice(batches, len(step.share(rank, world)))


def train_step(run: Run, step: Step, batches: Iterable[LoadedBatch], *, epoch: int) -> StepResult:
    """One optimiser step on this process's `batches` of it and, by summation, on those of the other processes.

    The gradient is the sum over the step's images divided by their number, whatever the batch sizes and the number
    of processes.
    """
    network, stepper = run.network, run.stepper
    loss_B = torch.zeros(step.num_images, device=run.device)  # stays 0 for the images of other processes
    sigma_B = torch.zeros(step.num_images)
    preservation = torch.zeros((), device=run.device)
    for index, batch in zip(step.share(run.processes.rank, run.processes.world), batches, strict=True):
        network.set_multiplier(batch.network_multiplier)
        network.set_dropout_key(run.seed, step.number, index, num_images=len(batch.sample_keys))
        images = step.images(index)
        loss, sigma_B[images] = run.objective(batch, epoch)
        stepper.backward(loss.sum() / step.num_images)
        loss_B[images] = loss.detach()
        for loss in run.preservation.losses(batch, epoch):
            stepper.backward(loss.sum() / step.num_images)
            preservation += loss.detach().sum()
    network.set_dropout_key(None)
    loss_B, sigma_B, preservation = reduce(
        [loss_B, sigma_B, preservation], stepper.parameters, run.processes, run.device
    )
    timesteps = (sigma_B * 1000).tolist()
    run.measured = {}
    if run.preservation.terms:
        run.measured["loss_preservation"] = float(preservation) / step.num_images
    norm = stepper.gradient_norm()
    # a finite loss with an infinite gradient is not a failure: the loss scaler backs off
    overflowed = bool(loss_B.isfinite().all()) and stepper.overflowed(norm)
    keys = [key for batch in step.batches for key in run.loader.keys(batch)]
    taken = not overflowed and run.guard.admits(
        step.number, keys, timesteps, loss_B, norm, network, last_good=run.last_good, report=run.report
    )
    if not taken:
        stepper.skip()
        return StepResult(loss_B, timesteps, norm, taken)
    stepper.step()
    if max_norm := run.config.network_training.scale_weight_norms:
        run.measured |= limit_norms(network, max_norm).metrics()
    if run.ema is not None:
        run.ema.update()
    return StepResult(loss_B, timesteps, norm, taken)


def reduce(
    values: Sequence[Tensor], parameters: Sequence[Tensor], processes: Processes, device: torch.device
) -> list[Tensor]:
    """The float32 `values` summed over all processes, on the CPU; sums the parameters' gradients in place.

    A parameter that has no gradient in any process (module dropout skipped it in all batches) has none afterwards.
    """
    if processes.world == 1:
        return [value.cpu() for value in values]
    has_gradient_P = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    flat = [value.reshape(-1).to(device) for value in (*values, has_gradient_P)]
    together = torch.cat(flat)
    sum_over_processes([together])
    *sums, has_gradient_P = torch.split_with_sizes(together.cpu(), [len(value) for value in flat])
    for parameter, has_gradient in zip(parameters, has_gradient_P.tolist(), strict=True):
        if has_gradient and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_over_processes([parameter.grad for parameter in parameters if parameter.grad is not None])
    return [total.reshape(value.shape) for total, value in zip(sums, values, strict=True)]


def any_rank_signal(
    own: signal.Signals | None, processes: Processes, device: torch.device
) -> signal.Signals | None:
    """The signal that any of the processes has received, the same in all of them; None if there is none."""
    if processes.world == 1:
        return own
    counts = {number: torch.zeros(1, device=device) for number in STOP_SIGNALS}
    if own is not None:
        counts[own] += 1
    sum_over_processes(list(counts.values()))
    return next((number for number, count in counts.items() if bool(count)), None)


def _log(run: Run, task: Task, epoch: int, result: StepResult, cost: Mapping[str, float]) -> None:
    values = run.losses.add(result.loss_B, result.timesteps, taken=result.taken)
    values |= {"gradient_norm": result.gradient_norm if result.taken else math.nan}
    values |= run.measured | run.stepper.metrics
    run.metrics.write({"step": run.step, "epoch": epoch, **values, "samples": len(result.loss_B), **cost})
    values |= cost
    run.accelerator.log({k: v for k, v in values.items() if math.isfinite(v)}, step=run.step)
    task.advance(detail=live_text(values, epoch, run.schedule.num_epochs))


class StopRequest:
    """Handles stop signals inside a `with` block; `signal` is the first one received, or None.

        with StopRequest(report) as stop:
            for step in steps:
                ...
                if stop.signal is not None:
                    break

    The second signal raises KeyboardInterrupt or Terminated wherever the program is. torchrun and `accelerate
    launch` forward the terminal's Ctrl-C as a SIGTERM: that one does not count as the second, nor do the
    repetitions that `is_repetition` recognises. Python delivers signals to the main thread only; in any other
    thread the block does nothing.
    """

    def __init__(self, report: Reporter) -> None:
        self.signal: signal.Signals | None = None
        self._last: int | None = None
        self._under_launcher = "TORCHELASTIC_RUN_ID" in os.environ
        self._report = report
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python and cannot be restored from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            relayed = self._under_launcher and number == signal.SIGTERM and self.signal == signal.SIGINT
            repeated = is_repetition(self._last, number)
            self._last = number
            if relayed or repeated:
                return
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
        self.signal = signal.Signals(number)
        self._last = number
        again = "press Ctrl-C again" if number == signal.SIGINT else "send the signal again"
        # a handler may interrupt another print, which streams do not allow
        with suppress(RuntimeError):
            self._report.note(f"finishing this step, then saving; {again} to stop at once")
