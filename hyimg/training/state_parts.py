"""The parts that every run's state has: network, optimiser, torch's and Python's own generators.

What comes and goes with options (schedule, loss scaler, average of the weights) brings its own `Stateful`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hyimg.errors import HyimgError
from hyimg.lora.network import LoRANetwork
from hyimg.report import Reporter
from hyimg.training.resume import Stateful
from hyimg.training.state_tree import equal


def network_part(network: LoRANetwork) -> Stateful:
    """The parameters as they are trained, in their own type, and each adapter's alpha."""

    def state_dict() -> dict[str, Any]:
        return {
            "weights": network.state_dict(),
            "alphas": {module.lora_name: lora.alpha for module, lora in network.adapters()},
        }

    def load_state_dict(state: Mapping[str, Any]) -> None:
        if problem := _misfit(network.state_dict(), state["weights"]):
            raise HyimgError(
                f"the state is of another network: {problem}",
                hint="give the ranks, patterns and kinds of adapter that it was saved with",
            )
        network.load_state_dict(state["weights"])
        for module, lora in network.adapters():
            lora.alpha = state["alphas"][module.lora_name]

    return Stateful("network", state_dict, load_state_dict)


class OptimizerPart:
    """The optimiser's state and its groups' numbers, which some optimisers change as they go.

    To be made right after the optimiser, while its groups hold what the settings say: where those have
    changed since the state was saved (`--resume_force`), a group's number is as the settings say now, else
    as it was when the state was saved. Another kind of optimiser, or other groups, start anew.
    """

    def __init__(self, optimizer: Optimizer, report: Reporter) -> None:
        self.optimizer = optimizer
        self.report = report
        self.kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        self.built = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    @property
    def part(self) -> Stateful:
        return Stateful("optimizer", self.state_dict, self.load_state_dict)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "built": self.built, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["optimizer"]
        counts = [len(group["params"]) for group in self.optimizer.param_groups]
        if state["kind"] != self.kind or [len(group["params"]) for group in saved["param_groups"]] != counts:
            self.report.warning(
                f"the optimiser's state ({state['kind']}) does not fit this run: it starts anew"
            )
            return
        self.optimizer.load_state_dict(saved)
        self._mend_types(saved["state"])
        self._page_again()
        if not equal(self.optimizer.state_dict()["state"], saved["state"]):
            self.report.warning(
                f"`{self.kind}` does not take its state back bit for bit: the run goes on, not exactly as it would have"
            )
        for group, before, now in zip(self.optimizer.param_groups, state["built"], self.built, strict=True):
            group.update({key: value for key, value in now.items() if before.get(key) != value})

    def _mend_types(self, saved: Mapping[int, Any]) -> None:
        """Undoes torch's cast of floating state to the parameter's type, where the optimiser keeps another."""
        parameters = list(chain.from_iterable(group["params"] for group in self.optimizer.param_groups))
        for number, values in saved.items():
            own = self.optimizer.state.get(parameters[number], {})
            for key, value in values.items():
                there = own.get(key)
                if isinstance(value, Tensor) and isinstance(there, Tensor) and there.dtype != value.dtype:
                    own[key] = value.to(there.device)

    def _page_again(self) -> None:
        """Moves state where bitsandbytes' paged optimisers keep it; they page what they make, not what they load."""
        optimizer: Any = self.optimizer
        if not getattr(optimizer, "is_paged", False):
            return
        for parameter, own in optimizer.state.items():
            for key in ("state1", "state2"):
                loaded = own.get(key)
                if isinstance(loaded, Tensor) and loaded.shape == parameter.shape:  # AdEMAMix has two in one
                    own[key] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
                    own[key].copy_(loaded)


def generators_part(device: torch.device) -> Stateful:
    """The global generators, from which nothing of ours draws, but a plugin may."""

    def state_dict() -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        numbers = dict(np.random.get_state(legacy=False))
        inner = dict(numbers.pop("state"))
        state["numpy"] = numbers | {"state": inner | {"key": torch.from_numpy(inner["key"].astype(np.int64))}}
        if device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(device)
        return state

    def load_state_dict(state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        inner = state["numpy"]["state"]
        key = inner["key"].numpy().astype(np.uint32)
        np.random.set_state(state["numpy"] | {"state": inner | {"key": key}})
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)

    return Stateful("generators", state_dict, load_state_dict)


def _misfit(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str | None:
    for names, what in (
        (saved.keys() - own.keys(), "is of no adapter"),
        (own.keys() - saved.keys(), "is missing"),
    ):
        if names:
            return f"`{min(names)}` {what}"
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            return f"`{name}` has the shape {list(saved[name].shape)} and not {list(tensor.shape)}"
    return None
