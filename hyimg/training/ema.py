"""Averages of the weights, used for saving, samples and validation: `--ema_decay`, and schedule-free optimisers.

After step n the average a becomes d*a + (1-d)*w with d = min(decay, (1+n)/(10+n)), so that early
averages forget the initial weights (as in TensorFlow and diffusers).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hyimg.errors import HyimgError
from hyimg.training.optimizers import has_modes


class AdapterEMA:
    """The average of a network's trained parameters, float32, where the parameters are.

    `state_dict` and `load_state_dict` carry it over a resume bit for bit: the averages by the parameters'
    names, and the number of steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        assert 0 <= decay < 1
        self.decay = decay
        self.num_updates = 0
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average; call it after each optimiser step."""
        self.num_updates += 1
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        values = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), values, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A block in which the parameters are the averages, swapped without a copy; do not train in it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._averages[name] = self._averages[name], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises HyimgError if the averages belong to other parameters."""
        averages: Mapping[str, Tensor] = state["averages"]
        own = {name: average.shape for name, average in self._averages.items()}
        if own != {name: average.shape for name, average in averages.items()}:
            raise HyimgError("the saved average belongs to a different network")
        for name, average in self._averages.items():
            average.copy_(averages[name])
        self.num_updates = int(state["num_updates"])


@contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """A block in which the parameters hold the average that the optimiser keeps (x of arXiv 2405.15682).

    They are restored exactly from a copy: switching back and forth by the optimiser's own `eval` and `train` would
    round, so that saving would change the run. Does nothing for an optimiser without modes.
    """
    if not has_modes(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, values in zip(parameters, trained, strict=True):
                parameter.copy_(values)
