"""An exponential moving average of the adapter (`--ema_decay`): what is saved, sampled and validated with.

After step n the average a becomes d*a + (1-d)*w with d = min(decay, (1+n)/(10+n)), so that it is not held
back by the fresh weights it starts at (the schedule of TensorFlow's and diffusers' averages).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyimg.errors import HyimgError


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
        """Takes the parameters in; call it after each optimiser step."""
        self.num_updates += 1
        weight = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        values = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), values, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A block in which the parameters are the averages; nothing is copied, and nothing may be trained."""
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
        """Raises HyimgError for averages of other parameters."""
        averages: Mapping[str, Tensor] = state["averages"]
        own = {name: average.shape for name, average in self._averages.items()}
        if own != {name: average.shape for name, average in averages.items()}:
            raise HyimgError("the saved average of the adapter is of another network")
        for name, average in self._averages.items():
            average.copy_(averages[name])
        self.num_updates = int(state["num_updates"])
