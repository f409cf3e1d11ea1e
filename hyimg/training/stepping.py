"""From a step's losses to moved weights: scaling, clipping, the optimiser's step and the schedule's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hyimg.training.fused_backward import FusedBackward
from hyimg.training.loss_scaler import LossScaler
from hyimg.training.optimizers import rates


class Stepper:
    """What the loop does with losses, in this order:

        for each batch:
            stepper.backward(loss)
        norm = stepper.gradient_norm()
        stepper.step() or stepper.skip()

    `max_grad_norm` 0 does not clip. With `fused` the backward pass has moved the weights already, so that a
    step cannot be left out; it excludes clipping, scaling and several batches to a step.
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
        self.told: dict[str, float] = {}
        """What metrics tell of the last step: the rates, and the scale of its loss where it was scaled."""
        self._norm: Tensor | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that the optimiser moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a scalar, to the step's."""
        torch.autograd.backward(loss * self.scaler.scale if self.scaler is not None else loss)

    def gradient_norm(self) -> float:
        """The norm of the step's gradient before clipping, as if the loss were not scaled. Call it once a step."""
        if self.fused is not None:
            self._norm = get_total_norm(self.fused.finish())  # of norms as of their vectors
        else:
            self._norm = _norm(self._gradients())
        return float(self._norm) / (self.scaler.scale if self.scaler is not None else 1.0)

    def overflowed(self, norm: float) -> bool:
        """Whether the norm is not finite because the loss was scaled too high: then `skip`, it is no failure."""
        return self.scaler is not None and self.scaler.overflowed(norm)

    def step(self) -> None:
        """Moves the weights by the step's gradient, then sets the next step's rates."""
        assert self._norm is not None, "the norm comes first"
        if self.fused is None:
            if self.scaler is not None and self.scaler.scale != 1:
                torch._foreach_mul_(self._gradients(), 1 / self.scaler.scale)
                self._norm = self._norm / self.scaler.scale
            if self.max_grad_norm:
                clip_grads_with_norm_(self.parameters, self.max_grad_norm, self._norm)
            self.optimizer.step()
        self._tell()
        if self.scheduler is not None:
            self.scheduler.step()
        self._end(finite=True)

    def skip(self) -> None:
        """Leaves the step out: weights, optimiser and schedule stay, and a scaled loss is scaled less."""
        assert self.fused is None, "a fused step cannot be left out"
        self._tell()
        self._end(finite=False)

    def _end(self, *, finite: bool) -> None:
        if self.scaler is not None:
            self.scaler.update(finite=finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._norm = None

    def _tell(self) -> None:
        self.told = rates(self.optimizer)
        if self.scaler is not None:
            self.told["loss_scale"] = self.scaler.scale

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def _norm(gradients: list[Tensor]) -> Tensor:
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return get_total_norm(gradients)
    # of 16 bits a norm would be rounded to 16 bits, and in float16 soon be infinite
    return get_total_norm([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
