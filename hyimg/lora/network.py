"""The LoRA network: one adapter for each planned Linear of a DiT's double and single blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA
from hyimg.lora.base import Adapter
from hyimg.lora.dropout import Dropout, DropoutRates
from hyimg.lora.file import read_lora, require_finite
from hyimg.lora.lycoris import lycoris_adapters
from hyimg.lora.plan import ModulePlan, plan_from_state, plan_network
from hyimg.model.architecture import DiTArch
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

    def __init__(
        self,
        plan: Sequence[ModulePlan],
        kind: type[Adapter] = LoRA,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """`kind` makes the adapters, with `arguments` beside each module's plan."""
        super().__init__()
        self.plan = tuple(module for module in plan if module.rank)
        if not self.plan:
            raise HyimgError(
                "the network is empty: every module has the rank 0",
                hint="a pattern in `network_reg_dims` must leave at least one module a rank",
            )
        for module in self.plan:
            lora = kind.create(module, **(arguments or {}))
            lora.requires_grad_(module.learning_rate != 0)
            self.add_module(module.lora_name, lora)

    @staticmethod
    def create(
        dit: DiT,
        rank: int = 4,
        alpha: float = 1.0,
        seed: int = 0,
        plan: Sequence[ModulePlan] | None = None,
        kind: type[Adapter] = LoRA,
        arguments: Mapping[str, Any] | None = None,
    ) -> LoRANetwork:
        """A fresh network that does nothing yet, not attached. `plan` takes the place of rank and alpha."""
        if plan is None:
            plan = plan_network(linear_modules(dit.arch), dim=rank, alpha=alpha)
        network = LoRANetwork(plan, kind, arguments)
        for module, lora in network.adapters():
            lora.initialize(seed, module.name)
        return network

    @staticmethod
    def from_file(path: str | os.PathLike[str], dit: DiT) -> LoRANetwork:
        """`read` for a DiT that is there."""
        return LoRANetwork.read(path, dit.arch)

    @staticmethod
    def read(path: str | os.PathLike[str], arch: DiTArch) -> LoRANetwork:
        """A file in any LoRA format as a network with the file's ranks and alphas, in float32, not attached.

        A file's LoHas and LoKrs act and merge as well, and are not trained or saved.

        Raises `HyimgError` for what `read_lora` refuses, for weights that are not finite, and for a LoRA of a
        model of another size.
        """
        state = read_lora(path, lycoris=True)
        require_finite(path, state)
        others = lycoris_adapters(linear_modules(arch), state)
        taken = tuple(f"{module.lora_name}." for module, _ in others)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(taken)}
        plan = plan_from_state(linear_modules(arch), state)
        network = LoRANetwork(plan) if any(module.rank for module in plan) else None
        if network is not None and (problem := network.misfit(state)):
            raise HyimgError(f"`{path}` does not fit the model: {problem}")
        for module, adapter in others:
            if adapter.shape != (module.out_features, module.in_features):
                raise HyimgError(
                    f"`{path}` does not fit the model: `{module.name}` has the shape {list(adapter.shape)} where "
                    f"it needs {[module.out_features, module.in_features]}"
                )
        if network is None and (state or not others):
            raise HyimgError(f"`{path}` does not fit the model: none of its modules is in the model")
        if network is not None:
            network.load_state(state)
        return network.joined(others) if network is not None else LoRANetwork.of(others)

    @staticmethod
    def of(adapters: Sequence[tuple[ModulePlan, Adapter]]) -> LoRANetwork:
        """A network of adapters that are there already, in model order, of any kinds."""
        network = LoRANetwork.__new__(LoRANetwork)
        nn.Module.__init__(network)
        network.plan = tuple(module for module, _ in adapters)
        for module, lora in adapters:
            network.add_module(module.lora_name, lora)
        return network

    def joined(self, others: Sequence[tuple[ModulePlan, Adapter]]) -> LoRANetwork:
        """This network's adapters and others, of other modules."""
        return LoRANetwork.of([*self.adapters(), *others]) if others else self

    def adapters(self) -> Iterator[tuple[ModulePlan, Adapter]]:
        """Every adapter with its plan, in model order."""
        for module, lora in zip(self.plan, self.children(), strict=True):
            assert isinstance(lora, Adapter)
            yield module, lora

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Drops the adapters whose module (`double_blocks.0.img_attn_qkv`) is not `wanted`; none is attached."""
        for module in self.plan:
            if not wanted(module.name):
                delattr(self, module.lora_name)
        self.plan = tuple(module for module in self.plan if wanted(module.name))

    def attach(self, dit: DiT) -> None:
        """Lets the adapters act on a DiT, after those that act already. Devices are the caller's business.

        A DoRA takes the lengths of the DiT's rows, and scales what acted before it as if it were the base's; so it does
        where networks are merged.
        """
        for module, lora in self.adapters():
            linear = _linear(dit, module.name)
            assert lora not in linear.adapters, f"{module.name} is attached already"
            lora.attached(linear)
            linear.adapters = (*linear.adapters, lora)

    def detach(self, dit: DiT) -> None:
        """Takes the adapters off again; those of other networks stay."""
        for module, lora in self.adapters():
            linear = _linear(dit, module.name)
            linear.adapters = tuple(adapter for adapter in linear.adapters if adapter is not lora)
            lora.detached()

    def set_multiplier(self, multiplier: float) -> None:
        """Scales the whole network: 1 as trained, 0 the base model bit for bit, negative inverts."""
        for _, lora in self.adapters():
            lora.multiplier = multiplier

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """A block in which the model is the base, bit for bit."""
        before = [lora.multiplier for _, lora in self.adapters()]
        self.set_multiplier(0)
        try:
            yield
        finally:
            for (_, lora), multiplier in zip(self.adapters(), before, strict=True):
                lora.multiplier = multiplier

    def set_dropout(self, rates: DropoutRates) -> None:
        """Gives every adapter dropout of these rates, which acts while there is a key."""
        for module, lora in self.adapters():
            lora.dropout = Dropout(rates, module.name) if rates.any else None

    def set_dropout_key(self, *key: object, num_images: int = 1) -> None:
        """What the masks follow from: (seed, step, micro-batch), or None to drop nothing.

        `num_images` is the size of the micro-batch, whose images have rows of their own in a rank's mask.
        `micro_batch` counts the batches of a step over all processes. The key must stay until the backward
        pass is over, since gradient checkpointing draws the masks again there.
        """
        for _, lora in self.adapters():
            if lora.dropout is not None:
                lora.dropout.key = None if key == (None,) else key
                lora.dropout.num_images = num_images

    def state(self) -> dict[str, Tensor]:
        """Tensors under the reference tool's names, ready for `save_lora`.

        The weights are not copied, except those of a split adapter, which a file holds joined.
        """
        return {
            f"{module.lora_name}.{end}": tensor
            for module, lora in self.adapters()
            for end, tensor in lora.tensors().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state of the reference tool's names into the adapters, alpha too where it is there.

        Raises `HyimgError` where names or shapes are not this network's; nothing is changed then.
        """
        if problem := self.misfit(state):
            raise HyimgError(
                f"the LoRA weights do not fit the network: {problem}",
                hint="give the `--network_dim`, patterns and `--network_args` that they were trained with",
            )
        for module, lora in self.adapters():
            lora.load_tensors(_of_module(module, lora, state))

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
        for module, lora in self.adapters():
            if problem := lora.misfit(_of_module(module, lora, state)):
                return f"`{module.lora_name}` {problem}"
        return None

    def parameter_groups(self, learning_rate: float, loraplus_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups `{"params": [...], "lr": ...}`; see `rate_groups`."""
        return [group.options() for group in self.rate_groups(learning_rate, loraplus_lr_ratio)]

    def rate_groups(self, learning_rate: float, loraplus_lr_ratio: float = 1.0) -> list[RateGroup]:
        """The parameters by rate and role; the groups of the run's own rate come first, else all in model order.

        A module without a rate of its own has `learning_rate`; one with the rate 0 is frozen and in none. Up
        matrices get `loraplus_lr_ratio` times the rate, in a group of their own unless it is 1. Magnitudes
        have one too, since weight decay would draw rows towards 0, where the base's are not.
        """
        found: dict[tuple[float, str], RateGroup] = {}
        for module, lora in self.adapters():
            rate = learning_rate if module.learning_rate is None else module.learning_rate
            if module.learning_rate == 0:
                continue
            for kind, parameters in lora.roles():
                lr = rate * loraplus_lr_ratio if kind == "up" else rate
                # down and up are told apart where their rates are
                role = "" if kind in ("down", "up") and loraplus_lr_ratio == 1 else kind
                group = found.setdefault((rate, role), RateGroup(lr, role, []))
                group.parameters.extend(parameters)
        return [found[key] for key in sorted(found, key=lambda key: key[0] != learning_rate)]


@dataclass(frozen=True)
class RateGroup:
    """Parameters of one learning rate: `role` is one of `Adapter.roles`, empty for down and up together."""

    lr: float
    role: str
    parameters: list[nn.Parameter]

    def options(self) -> dict[str, Any]:
        """The group as optimisers take it."""
        options: dict[str, Any] = {"params": self.parameters, "lr": self.lr}
        return {**options, "weight_decay": 0.0} if self.role == "magnitude" else options


def _of_module(module: ModulePlan, lora: Adapter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a state holds of one adapter, by the ends of the names."""
    names = {end: f"{module.lora_name}.{end}" for end in lora.tensors()}
    return {end: state[name] for end, name in names.items() if name in state}


def _linear(dit: DiT, name: str) -> Linear:
    linear = dit.get_submodule(name)
    assert isinstance(linear, Linear), name
    return linear
