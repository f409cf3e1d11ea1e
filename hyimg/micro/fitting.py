"""Training all weights of a model: the loop that the VAE and the DiT of the micro model share.

A step's loss is a function of its number, and the state is written whole or not at all, so that a build that was
killed at any moment goes on to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from hyimg.errors import RunError
from hyimg.micro.recipe import Fit
from hyimg.report import Reporter
from hyimg.training.ema import AdapterEMA
from hyimg.training.metrics import MetricsLog
from hyimg.training.resume import Stateful
from hyimg.training.state_folder import MANIFEST, read_state, write_state
from hyimg.training.state_tree import pack, unpack
from hyimg.training.stepping import Stepper

StepLoss = Callable[[int], tuple[Tensor, Mapping[str, float]]]
"""Number of a step, from 0 -> its loss with its graph, and what the log tells of it beside."""

LOG_EVERY = 20
"""Steps of which a line of the log has the means."""
SAVE_EVERY = 200
"""A multiple of it, so that what is logged does not depend on where a build was stopped."""


class Fitting:
    """One model's way from its first weights to its average.

    `folder` takes the state, which must be of the same recipe, `log_path` a JSON line every 20 steps.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        fit: Fit,
        loss: StepLoss,
        *,
        folder: Path,
        log_path: Path,
        report: Reporter,
    ) -> None:
        from transformers.optimization import get_cosine_schedule_with_warmup

        self.name = name
        self.model = model
        self.fit = fit
        self.loss = loss
        self.state_path = folder / f"{name}-state"
        self.log_path = log_path
        self.report = report
        optimizer = torch.optim.AdamW(model.parameters(), fit.learning_rate, weight_decay=fit.weight_decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, fit.warmup_steps, fit.steps)
        self.stepper = Stepper(optimizer, max_grad_norm=fit.max_grad_norm, scheduler=schedule)
        self.ema = AdapterEMA(model, fit.ema_decay)
        self.parts = [
            Stateful("model", model.state_dict, model.load_state_dict),
            Stateful("optimizer", optimizer.state_dict, optimizer.load_state_dict),
            Stateful("schedule", schedule.state_dict, schedule.load_state_dict),
            Stateful("ema", self.ema.state_dict, self.ema.load_state_dict),
        ]

    def run(self, *, stop_after: int | None = None) -> None:
        """Trains to the end, from the state where there is one; the model then holds its average.

        `stop_after` leaves it at that step. Raises RunError for a loss that is not finite, HyimgError for a damaged
        state.
        """
        first, before = self._resume()
        last = self.fit.steps if stop_after is None else min(stop_after, self.fit.steps)
        with (
            MetricsLog(self.log_path, before) as log,
            self.report.task(self.name, self.fit.steps, unit="step", done=first) as task,
        ):
            started, window = time.monotonic(), list[dict[str, float]]()
            for step in range(first, last):
                values = self._step(step)
                done = step + 1
                window.append({**values, "seconds_a_step": time.monotonic() - started})
                started = time.monotonic()
                if done % LOG_EVERY == 0 or done == self.fit.steps:
                    means = {name: fmean(one[name] for one in window) for name in window[0]}
                    log.write({"step": done, **{name: round(mean, 5) for name, mean in means.items()}})
                    window.clear()
                task.advance(detail=f"loss {values['loss']:.4f}")
                if done % SAVE_EVERY == 0 or done == last:
                    self._save(done, log)
        self.model.load_state_dict(self.model.state_dict() | self.ema.state_dict()["averages"])

    def _step(self, step: int) -> dict[str, float]:
        loss, details = self.loss(step)
        self.stepper.backward(loss)
        norm = self.stepper.gradient_norm()
        value = float(loss.detach())
        if not torch.isfinite(torch.tensor([value, norm])).all():
            raise RunError(
                f"the loss of the {self.name} is {value} at step {step + 1}", hint="lower its learning rate"
            )
        self.stepper.step()
        self.ema.update()
        return {"loss": value, **details, "gradient_norm": norm}

    def _resume(self) -> tuple[int, str]:
        """How many steps were done, and the log of them."""
        if not (self.state_path / MANIFEST).is_file():
            return 0, ""
        state = read_state(self.state_path)
        for part in self.parts:
            part.load_state_dict(unpack(state.document["parts"][part.name], state.tensors(part.name)))
        return int(state.document["step"]), state.metrics()

    def _save(self, step: int, log: MetricsLog) -> None:
        trees, tensors = {}, {}
        for part in self.parts:
            trees[part.name], tensors[part.name] = pack(part.state_dict())
        document = {"step": step, "parts": trees}
        write_state(self.state_path, document, tensors, log.text())
