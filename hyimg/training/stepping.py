"""The optimiser step: loss scaling, gradient norm and clipping, non-finite values, optimiser and LR scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hyimg.errors import DivergedError, first_few
from hyimg.lora.network import AdapterNetwork
from hyimg.report import Reporter, count_text
from hyimg.training.optimizers import rates


class FusedBackward:
    """`--fused_backward_pass`: steps each parameter as soon as the backward pass has summed its gradient.

    The gradient is freed at once, so that only a few exist at a time. The result is bit-equal to the plain order for
    an optimiser that treats each parameter separately, which `hyimg.training.optimization` checks.

    The optimiser keeps its groups and state. Inside a hook it sees one group with the one parameter; numbers that it
    keeps in a group (such as a step count) start from the same value for every parameter, and their new values are
    stored after the backward pass (`finish`). A step is one backward pass: gradients are not accumulated.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._norms: dict[Tensor, Tensor] = {}
        self._advanced: dict[int, dict[str, Any]] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p, n=number: self._step(p, n))
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]

    def finish(self) -> list[Tensor]:
        """Ends a step; returns the norm of each parameter's gradient, float32, in the order of the parameters."""
        groups = self.optimizer.param_groups
        for number, advanced in self._advanced.items():
            groups[number].update({key: value for key, value in advanced.items() if key != "params"})
        norms = [self._norms[p] for group in groups for p in group["params"] if p in self._norms]
        self._advanced, self._norms = {}, {}
        return norms

    def remove(self) -> None:
        """Removes the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _step(self, parameter: Tensor, number: int) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        optimizer = self.optimizer
        groups = optimizer.param_groups
        alone = {**groups[number], "params": [parameter]}
        optimizer.param_groups = [alone]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None
        self._advanced[number] = alone


# The constants of torch.amp.GradScaler
_GROWTH = 2.0
_BACKOFF = 0.5
_GROWTH_INTERVAL = 2000


class LossScaler:
    """The loss scale: halved after a gradient that is not finite, doubled after 2000 finite ones.

    Scaling keeps small float16 gradients from rounding to zero (Micikevicius et al., arXiv 1710.03740). The scale is
    a power of two, so that scaling and unscaling are exact. torch's `GradScaler` rejects float16 gradients, which
    `--full_fp16` produces, and searches them for infinities again; here the norm, computed anyway, shows those.
    """

    def __init__(self, scale: float = 65536.0) -> None:
        self.scale = scale
        self._finite_steps = 0

    def overflowed(self, norm: float) -> bool:
        """Whether a gradient norm is not finite and a smaller scale may fix that.

        At a scale of 1 or less, the gradient itself is at fault.
        """
        return not math.isfinite(norm) and self.scale > 1

    def update(self, *, finite: bool) -> None:
        """Chooses the next step's scale; `finite` says whether this step's gradient was finite."""
        self._finite_steps = self._finite_steps + 1 if finite else 0
        if not finite:
            self.scale *= _BACKOFF
        elif self._finite_steps == _GROWTH_INTERVAL:
            self.scale *= _GROWTH
            self._finite_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "finite_steps": self._finite_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale = state["scale"]
        self._finite_steps = state["finite_steps"]


class Stepper:
    """Optimiser, LR scheduler, clipping and loss scaling, called in this order:

        for each batch:
            stepper.backward(loss)
        norm = stepper.gradient_norm()
        stepper.step() or stepper.skip()

    `max_grad_norm` 0 disables clipping. With `fused`, the backward pass has already moved the weights: the step
    cannot be skipped, and clipping, loss scaling and gradient accumulation are not possible.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_grad_norm: float = 0.0,
        scheduler: LRScheduler | None = None,
        scaler: LossScaler | None = None,
        fused: FusedBackward | None = None,
    ) -> None:
        assert fused is None or (scaler is None and not max_grad_norm)
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.scheduler = scheduler
        self.scaler = scaler
        self.fused = fused
        self.metrics: dict[str, float] = {}
        """Of the last step: the learning rates, and the loss scale if there is one."""
        self._norm: Tensor | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of the optimiser, in the order of its groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a scalar. Module dropout may leave it without a graph: nothing to add."""
        if loss.requires_grad:
            torch.autograd.backward(loss * self.scaler.scale if self.scaler is not None else loss)

    def gradient_norm(self) -> float:
        """The norm of the step's gradient before clipping, without the loss scale. Call it once per step."""
        if self.fused is not None:
            self._norm = get_total_norm(self.fused.finish())  # the norm of norms is the norm
        else:
            self._norm = _norm(self._gradients())
        return float(self._norm) / (self.scaler.scale if self.scaler is not None else 1.0)

    def overflowed(self, norm: float) -> bool:
        """Whether the norm is not finite because the loss scale is too high: then `skip`, it is no failure."""
        return self.scaler is not None and self.scaler.overflowed(norm)

    def step(self) -> None:
        """Clips, moves the weights, and sets the learning rates of the next step."""
        assert self._norm is not None, "`gradient_norm` comes first"
        if self.fused is None:
            if self.scaler is not None and self.scaler.scale != 1:
                torch._foreach_mul_(self._gradients(), 1 / self.scaler.scale)
                self._norm = self._norm / self.scaler.scale
            if self.max_grad_norm:
                clip_grads_with_norm_(self.parameters, self.max_grad_norm, self._norm)
            self.optimizer.step()
        self._record_metrics()
        if self.scheduler is not None:
            self.scheduler.step()
        self._end(finite=True)

    def skip(self) -> None:
        """Skips the step: weights, optimiser and LR scheduler do not change; the loss scale is reduced."""
        assert self.fused is None, "a fused step cannot be skipped"
        self._record_metrics()
        self._end(finite=False)

    def _end(self, *, finite: bool) -> None:
        if self.scaler is not None:
            self.scaler.update(finite=finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._norm = None

    def _record_metrics(self) -> None:
        self.metrics = rates(self.optimizer)
        if self.scaler is not None:
            self.metrics["loss_scale"] = self.scaler.scale

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def _norm(gradients: list[Tensor]) -> Tensor:
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return get_total_norm(gradients)
    # the norm of 16-bit gradients would be rounded to 16 bits, and soon be infinite in float16
    return get_total_norm([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])


MAX_SKIPPED_IN_A_ROW = 10
"""With `--on_nan skip`, a run has diverged after so many skipped steps in a row."""

_MOST_NAMED = 4


@dataclass
class NonFiniteGuard:
    """`--on_nan`: stops the run at a loss or gradient that is not finite or, with `skip`, skips the step.

    `image_paths` maps image keys to paths, for messages; `is_fp16` means that the DiT computes in fp16. The counts
    are part of the run's state.
    """

    skip: bool = False
    image_paths: Mapping[str, Path] = field(default_factory=dict)
    is_fp16: bool = False
    num_skipped: int = 0
    in_a_row: int = 0

    def admits(
        self,
        step: int,
        image_keys: Sequence[str],
        timesteps: Sequence[float],
        loss_B: Tensor,
        gradient_norm: float,
        network: AdapterNetwork,
        *,
        last_good: Path | None,
        report: Reporter,
    ) -> bool:
        """Whether the step may be taken; its gradients must still be there. `loss_B` is on the CPU, and keys and
        timesteps (0..1000) are in its order.

        Raises DivergedError, naming images, timesteps and module, if the run has to stop.
        """
        if math.isfinite(gradient_norm) and bool(loss_B.isfinite().all()):
            self.in_a_row = 0
            return True
        trouble = self._describe(step, image_keys, timesteps, loss_B.tolist(), network)
        self.num_skipped += 1
        self.in_a_row += 1
        if not self.skip:
            raise DivergedError(trouble, hint=self._hint(step, last_good))
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"{trouble}; {self.in_a_row} such steps in a row", hint=self._hint(step, last_good)
            )
        report.warning(f"{trouble}: skipped ({count_text(self.num_skipped, 'step')} so far)")
        return False

    def _describe(
        self,
        step: int,
        keys: Sequence[str],
        timesteps: Sequence[float],
        losses: Sequence[float],
        network: AdapterNetwork,
    ) -> str:
        images = list(zip(keys, timesteps, losses, strict=True))
        bad = [image for image in images if not math.isfinite(image[2])]
        named = first_few(
            [f"`{self.image_paths.get(key, key)}` at timestep {t:.1f}" for key, t, _ in bad or images],
            limit=_MOST_NAMED,
        )
        module = first_bad_module(network)
        where = f"; first module with such a gradient: `{module}`" if module is not None else ""
        return f"the {'loss' if bad else 'gradient'} is not finite at step {step}: {named}{where}"

    def _hint(self, step: int, last_good: Path | None) -> str:
        hint = "lower `--learning_rate`, or skip such steps with `--on_nan skip`; nothing was saved before"
        if last_good is not None:
            hint = (
                f"lower `--learning_rate`, or skip such steps with `--on_nan skip`; last saved: `{last_good}`"
            )
        elif step == 1:
            hint = "at the first step, check the model, the caches and `--network_weights`"
        if self.is_fp16:
            return f"values may have overflowed in fp16: use `--mixed_precision bf16` or `no`, or {hint}"
        return hint

    def state_dict(self) -> dict[str, int]:
        return {"num_skipped": self.num_skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_skipped, self.in_a_row = state["num_skipped"], state["in_a_row"]


def first_bad_module(network: AdapterNetwork) -> str | None:
    """The first module, in model order, whose gradient is not finite."""
    for module, adapter in network.adapters():
        for parameter in adapter.parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return module.name
    return None
