"""`--optimizer_schedulefree_wrapper`: another optimiser made schedule-free (Defazio et al., arXiv 2405.15682).

Imported only where it is asked for, since the package schedulefree is optional.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor
from torch.optim import Optimizer

from hyimg.errors import HyimgError

# Numbers that the wrapper keeps in the parameter groups
_GROUP_KEYS = ("k", "lr_max", "weight_sum")


class ScheduleFreeOptimizer(ScheduleFreeWrapper, Optimizer):  # type: ignore[misc]
    """schedulefree's wrapper around `base`, with its buffers apart from the state of `base`.

    schedulefree puts z, the point that `base` moves, into the state of `base`. Nearly every optimiser takes a
    parameter with any state for one that it has set up already, and fails at the first step. Here z has a
    dictionary that `base` does not see. Parameters hold y in training and the average x after `eval()`.

    `arguments` are those of schedulefree's class. Raises HyimgError for a `base` that cannot be wrapped.
    """

    def __init__(self, base: Optimizer, **arguments: Any) -> None:
        ScheduleFreeWrapper.__init__(self, base, **arguments)
        self._own_state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self._check()

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        return self._own_state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups  # type: ignore[no-any-return]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    def state_dict(self) -> dict[str, Any]:
        """The state of `base`, and z by the number of its parameter."""
        z = {
            number: self._own_state[parameter]["z"]
            for number, parameter in enumerate(self._parameters())
            if "z" in self._own_state[parameter]
        }
        return {**self.base.state_dict(), "z": z}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "z"})
        self._own_state.clear()
        parameters = self._parameters()
        for number, z in state_dict["z"].items():
            parameter = parameters[number]
            self._own_state[parameter]["z"] = z.to(parameter.device, copy=True)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check(self) -> None:
        kind = type(self.base).__name__
        option = "`--optimizer_schedulefree_wrapper`"
        if not 0 < self.momentum <= 1:
            raise HyimgError(
                f"`momentum={self.momentum:g}` in `--schedulefree_wrapper_args` must be above 0 and at most 1",
                hint="0.9 is usual",
            )
        shared = [key for key in _GROUP_KEYS if key in self.param_groups[0]]
        if shared:
            raise HyimgError(
                f"{option} cannot be used with `{kind}`: both keep a number named `{shared[0]}` in the "
                "parameter groups",
                hint="use another optimiser, or `--optimizer_type AdamWScheduleFree` without the wrapper",
            )
        if any(group["lr"] is None for group in self.param_groups):
            raise HyimgError(
                f"{option} cannot be used with `{kind}`, which makes its own learning rate",
                hint='give `--optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False"`',
            )
        if any(group["lr"] == 0 for group in self.param_groups):
            raise HyimgError(
                f"{option} needs a learning rate above 0: it weights its average by the rate",
                hint="raise `--learning_rate`",
            )
