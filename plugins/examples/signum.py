"""A hyimg plugin in one file: the optimiser `Signum`, signs of momentum (Bernstein et al., arXiv 1802.04434)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from hyimg.hookspecs import Provided, hookimpl


@hookimpl
def hyimg_optimizers() -> Provided:
    return {"Signum": Signum}


class Signum(Optimizer):
    """w <- w - lr * (sign(m) + weight_decay * w), m the moving average of the gradient.

    Each parameter is moved by itself, so that `--fused_backward_pass` works.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(average.sign(), alpha=group["lr"])
