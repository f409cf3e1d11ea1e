"""The LoRA network: one adapter for each planned Linear of a DiT's double and single blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA
from hyimg.lora.file import read_lora
from hyimg.lora.formats import lora_name
from hyimg.lora.plan import ModulePlan, plan_network
from hyimg.model.dit import DiT
from hyimg.model.keys import linear_modules
from hyimg.model.layers import Linear


class LoRANetwork(nn.Module):
    """Adapters by LoRA name, in model order.

    The adapters are this module's children, so that parameters are named as in a file
    (`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`) and come in model order, down before up. The
    base model knows them only as `Linear.adapters` between `attach` and `detach`; its own parameters,
    state_dict and device are never touched.
    """

    def __init__(self, plan: Sequence[ModulePlan]) -> None:
        super().__init__()
        self.plan = tuple(module for module in plan if module.rank)
        if not self.plan:
            raise HyimgError(
                "the network is empty: every module has the rank 0",
                hint="a pattern in `network_reg_dims` must leave at least one module a rank",
            )
        for module in self.plan:
            lora = LoRA(module.in_features, module.out_features, rank=module.rank, alpha=module.alpha)
            lora.requires_grad_(module.learning_rate != 0)
            self.add_module(module.lora_name, lora)

    @staticmethod
    def create(
        dit: DiT,
        rank: int = 4,
        alpha: float = 1.0,
        seed: int = 0,
        plan: Sequence[ModulePlan] | None = None,
    ) -> LoRANetwork:
        """A fresh network that does nothing yet, not attached. `plan` takes the place of rank and alpha."""
        if plan is None:
            plan = plan_network(linear_modules(dit.arch), dim=rank, alpha=alpha)
        network = LoRANetwork(plan)
        for module, lora in network.adapters():
            lora.initialize(seed, module.name)
        return network

    @staticmethod
    def from_file(path: str | os.PathLike[str], dit: DiT) -> LoRANetwork:
        """A file in any LoRA format as a network with the file's ranks and alphas, in float32, not attached.

        Raises `HyimgError` for what `read_lora` refuses and for a LoRA of a model of another size.
        """
        state = read_lora(path)
        plan = []
        for module in linear_modules(dit.arch):
            name = lora_name(module.name)
            if (down := state.get(f"{name}.lora_down.weight")) is not None:
                alpha = float(state[f"{name}.alpha"]) if f"{name}.alpha" in state else float(len(down))
                plan.append(
                    ModulePlan(module.name, module.in_features, module.out_features, len(down), alpha)
                )
        network = LoRANetwork(plan) if plan else None
        if network is None or (problem := network.misfit(state)):
            problem = problem if network else "none of its modules is in the model"
            raise HyimgError(f"`{path}` does not fit the model: {problem}")
        network.load_state(state)
        return network

    def adapters(self) -> Iterator[tuple[ModulePlan, LoRA]]:
        """Every adapter with its plan, in model order."""
        for module, lora in zip(self.plan, self.children(), strict=True):
            assert isinstance(lora, LoRA)
            yield module, lora

    def attach(self, dit: DiT) -> None:
        """Lets the adapters act on a DiT, after those that act already. Devices are the caller's business."""
        for module, lora in self.adapters():
            linear = _linear(dit, module.name)
            assert lora not in linear.adapters, f"{module.name} is attached already"
            linear.adapters = (*linear.adapters, lora)

    def detach(self, dit: DiT) -> None:
        """Takes the adapters off again; those of other networks stay."""
        for module, lora in self.adapters():
            linear = _linear(dit, module.name)
            linear.adapters = tuple(adapter for adapter in linear.adapters if adapter is not lora)

    def set_multiplier(self, multiplier: float) -> None:
        """Scales the whole network: 1 as trained, 0 the base model bit for bit, negative inverts."""
        for _, lora in self.adapters():
            lora.multiplier = multiplier

    def state(self) -> dict[str, Tensor]:
        """Tensors under the reference tool's names, ready for `save_lora`; the weights are not copied."""
        state: dict[str, Tensor] = {}
        for module, lora in self.adapters():
            state[f"{module.lora_name}.lora_down.weight"] = lora.lora_down.weight.detach()
            state[f"{module.lora_name}.lora_up.weight"] = lora.lora_up.weight.detach()
            state[f"{module.lora_name}.alpha"] = torch.tensor(lora.alpha)
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state of the reference tool's names into the adapters, alpha too where it is there.

        Raises `HyimgError` where names or shapes are not this network's; nothing is changed then.
        """
        if problem := self.misfit(state):
            raise HyimgError(
                f"the LoRA weights do not fit the network: {problem}",
                hint="give the `--network_dim` and patterns that they were trained with",
            )
        for module, lora in self.adapters():
            lora.lora_down.weight.copy_(state[f"{module.lora_name}.lora_down.weight"])
            lora.lora_up.weight.copy_(state[f"{module.lora_name}.lora_up.weight"])
            if (alpha := state.get(f"{module.lora_name}.alpha")) is not None:
                lora.alpha = float(alpha)

    def misfit(self, state: Mapping[str, Tensor]) -> str | None:
        """What of a state is not this network's, as the end of a sentence, or None where it fits."""
        own = self.state()
        missing = [name for name in own if name not in state and not name.endswith(".alpha")]
        surplus = [name for name in state if name not in own]
        for names, what in ((surplus, "is of no module of it"), (missing, "is missing")):
            if names:
                others = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
                return f"`{names[0]}` {what}{others}"
        for name, tensor in own.items():
            if name in state and state[name].shape != tensor.shape:
                return f"`{name}` has the shape {list(state[name].shape)} where it needs {list(tensor.shape)}"
        return None

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Optimiser groups `{"params": [...], "lr": ...}`, one for each rate, parameters in model order.

        A module without a rate of its own gets `learning_rate`, in the first group; one with the rate 0 is
        frozen and in none.
        """
        groups: dict[float, list[nn.Parameter]] = {learning_rate: []}
        for module, lora in self.adapters():
            rate = learning_rate if module.learning_rate is None else module.learning_rate
            if module.learning_rate != 0:
                groups.setdefault(rate, []).extend(lora.parameters())
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]


def _linear(dit: DiT, name: str) -> Linear:
    linear = dit.get_submodule(name)
    assert isinstance(linear, Linear), name
    return linear
