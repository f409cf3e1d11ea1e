"""`--fused_backward_pass`: each parameter is stepped in the backward pass, and its gradient freed at once.

So never more than a few parameters' gradients are in memory. It is the step of the plain order bit for bit,
for an optimiser that treats each parameter by itself; `hyimg.training.optimizer_trial` finds out whether one does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class FusedBackward:
    """Steps an optimiser parameter by parameter, as soon as the backward pass has summed a gradient.

    The optimiser stays as it is, its groups and its state those of the plain order. Inside a hook it is shown
    one group with the one parameter; numbers that it keeps in a group (a count of steps, say) start from
    the same value for each parameter and go on once the backward pass is over (`finish`). Each step is one
    backward pass: gradients are not accumulated over several.
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
        """Ends a step; gives the norm of each parameter's gradient, in the parameters' order, float32."""
        groups = self.optimizer.param_groups
        for number, advanced in self._advanced.items():
            groups[number].update({key: value for key, value in advanced.items() if key != "params"})
        norms = [self._norms[p] for group in groups for p in group["params"] if p in self._norms]
        self._advanced, self._norms = {}, {}
        return norms

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
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
