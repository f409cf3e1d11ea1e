"""The adapter network: one adapter for each planned Linear of a DiT's double and single blocks.

Max-norm regularisation (`--scale_weight_norms`) limits the norm of each module's update.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.names import linear_modules
from hyimg.errors import HyimgError, first_few
from hyimg.lora.adapter import LoRA
from hyimg.lora.base import Adapter, Dropout, DropoutRates
from hyimg.lora.files.conversion import read_adapters
from hyimg.lora.rank_plan import ModulePlan, plan_network
from hyimg.model.dit import DiT
from hyimg.model.layers import Linear


class AdapterNetwork(nn.Module):
    """Adapters of any kind by LoRA name, in model order.

    The adapters are this module's children, so that parameters are named as in a file
    (`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`) and come in model order, down before up. The
    base model refers to them only in `Linear.adapters`, between `attach` and `detach`; its own parameters,
    state_dict and device are never changed.
    """

    def __init__(
        self,
        plan: Sequence[ModulePlan],
        kind: type[Adapter] = LoRA,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Creates adapters of class `kind` from each module's plan and `arguments`."""
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
    ) -> AdapterNetwork:
        """A freshly initialised network without effect, not attached. `plan` replaces rank and alpha."""
        if plan is None:
            plan = plan_network(linear_modules(dit.arch), dim=rank, alpha=alpha)
        network = AdapterNetwork(plan, kind, arguments)
        for module, lora in network.adapters():
            lora.initialize(seed, module.name)
        return network

    @staticmethod
    def read(path: str | os.PathLike[str], arch: DiTArch) -> AdapterNetwork:
        """A file in any LoRA format as a network of frozen float32 adapters on the CPU, not attached.

        Raises `HyimgError` for what `read_lora` refuses, and for a LoRA of a model of another size.
        """
        read = dict(read_adapters(path))
        known = {module.name: module for module in linear_modules(arch)}
        if strange := [f"`{name}`" for name in read if name not in known]:
            which = f"{first_few(strange)} {'is' if len(strange) == 1 else 'are'} not in the model"
            if len(strange) == len(read):
                which = f"none of its modules is in the model: {first_few(strange)}"
            raise HyimgError(f"`{path}` does not fit the model: {which}")
        network = AdapterNetwork.__new__(AdapterNetwork)
        nn.Module.__init__(network)
        plan = []
        for name, module in known.items():
            if (adapter := read.get(name)) is None:
                continue
            shape, needed = ([side.out_features, side.in_features] for side in (adapter, module))
            if shape != needed:
                raise HyimgError(
                    f"`{path}` does not fit the model: the update of `{name}` has the shape {shape}, not {needed}"
                )
            plan.append(
                ModulePlan(name, module.in_features, module.out_features, adapter.rank, adapter.alpha)
            )
            network.add_module(plan[-1].lora_name, adapter)
        network.plan = tuple(plan)
        return network

    def adapters(self) -> Iterator[tuple[ModulePlan, Adapter]]:
        """Each adapter with its plan, in model order."""
        for module, lora in zip(self.plan, self.children(), strict=True):
            assert isinstance(lora, Adapter)
            yield module, lora

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Drops the adapters whose module (`double_blocks.0.img_attn_qkv`) is not `wanted`; not while attached."""
        for module in self.plan:
            if not wanted(module.name):
                delattr(self, module.lora_name)
        self.plan = tuple(module for module in self.plan if wanted(module.name))

    def attach(self, dit: DiT) -> None:
        """Appends the adapters to the DiT's Linears. The caller takes care of devices.

        A DoRA takes the norms of the DiT's rows, and scales the updates of adapters before it as if they were the
        base's, as in merging.
        """
        for module, lora in self.adapters():
            linear = _linear(dit, module.name)
            assert lora not in linear.adapters, f"{module.name} is already attached"
            lora.attached(linear)
            linear.adapters = (*linear.adapters, lora)

    def detach(self, dit: DiT) -> None:
        """Removes the adapters from the DiT; those of other networks stay."""
        for module, lora in self.adapters():
            linear = _linear(dit, module.name)
            linear.adapters = tuple(adapter for adapter in linear.adapters if adapter is not lora)
            lora.detached()

    def set_multiplier(self, multiplier: float) -> None:
        """Scales the whole network: 1 as trained, 0 the base model bit for bit, negative inverts."""
        for _, lora in self.adapters():
            lora.multiplier = multiplier

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the model is the base, bit for bit."""
        before = [lora.multiplier for _, lora in self.adapters()]
        self.set_multiplier(0)
        try:
            yield
        finally:
            for (_, lora), multiplier in zip(self.adapters(), before, strict=True):
                lora.multiplier = multiplier

    def set_dropout(self, rates: DropoutRates) -> None:
        """Gives every adapter dropout of these rates; it is active while there is a key."""
        for module, lora in self.adapters():
            lora.dropout = Dropout(rates, module.name) if rates.any else None

    def set_dropout_key(self, *key: object, num_images: int = 1) -> None:
        """Sets what the masks depend on: (seed, step, micro-batch), or None for no dropout.

        The micro-batch is its number in the step over all processes; it has `num_images` images, each with its own
        rank mask. Keep the key until the backward pass is over, since gradient checkpointing draws the masks again.
        """
        for _, lora in self.adapters():
            if lora.dropout is not None:
                lora.dropout.key = None if key == (None,) else key
                lora.dropout.num_images = num_images

    def state(self) -> dict[str, Tensor]:
        """The tensors under the reference tool's names, ready for `save_lora`.

        The weights are not copied, except those of a split adapter, which a file stores joined.
        """
        return {
            f"{module.lora_name}.{end}": tensor
            for module, lora in self.adapters()
            for end, tensor in lora.tensors().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state with the reference tool's names into the adapters, alpha too if the state has it.

        Raises `HyimgError`, and changes nothing, if names or shapes are not this network's.
        """
        if problem := self.mismatch(state):
            raise HyimgError(
                f"the LoRA weights do not fit the network: {problem}",
                hint="use the `--network_dim`, patterns and `--network_args` that they were trained with",
            )
        for module, lora in self.adapters():
            lora.load_tensors(_of_module(module, lora, state))

    def mismatch(self, state: Mapping[str, Tensor]) -> str | None:
        """How a state differs from this network's, as the end of a sentence; None if it fits."""
        own = self.state()
        missing = [name for name in own if name not in state and not name.endswith(".alpha")]
        surplus = [name for name in state if name not in own]
        for names, what, several in (
            (surplus, "belongs to none of its modules", "belong to none of its modules"),
            (missing, "is missing", "are missing"),
        ):
            if names:
                return f"{first_few([f'`{name}`' for name in names])} {what if len(names) == 1 else several}"
        for name, tensor in own.items():
            if name in state and state[name].shape != tensor.shape:
                return f"`{name}` has the shape {list(state[name].shape)}, not {list(tensor.shape)}"
        for module, lora in self.adapters():
            if problem := lora.mismatch(_of_module(module, lora, state)):
                return f"`{module.lora_name}` {problem}"
        return None

    def parameter_groups(self, learning_rate: float, loraplus_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups `{"params": [...], "lr": ...}`; see `rate_groups`."""
        return [group.options() for group in self.rate_groups(learning_rate, loraplus_lr_ratio)]

    def rate_groups(self, learning_rate: float, loraplus_lr_ratio: float = 1.0) -> list[RateGroup]:
        """The parameters by rate and role: groups with the run's rate first, otherwise in model order.

        A module without its own rate has `learning_rate`; one with the rate 0 is frozen and in no group. Up
        matrices get `loraplus_lr_ratio` times the rate, in a separate group unless that is 1. Magnitudes are in a
        separate group too, since weight decay would pull row norms to 0 instead of to the base's.
        """
        found: dict[tuple[float, str], RateGroup] = {}
        for module, lora in self.adapters():
            rate = learning_rate if module.learning_rate is None else module.learning_rate
            if module.learning_rate == 0:
                continue
            for kind, parameters in lora.roles():
                lr = rate * loraplus_lr_ratio if kind == "up" else rate
                # down and up share a group if they share a rate
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
        """The group in the form that optimisers take."""
        options: dict[str, Any] = {"params": self.parameters, "lr": self.lr}
        return {**options, "weight_decay": 0.0} if self.role == "magnitude" else options


def _of_module(module: ModulePlan, lora: Adapter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One adapter's tensors in a state, by the ends of their names."""
    names = {end: f"{module.lora_name}.{end}" for end in lora.tensors()}
    return {end: state[name] for end, name in names.items() if name in state}


def _linear(dit: DiT, name: str) -> Linear:
    linear = dit.get_submodule(name)
    assert isinstance(linear, Linear), name
    return linear


@dataclass(frozen=True)
class NormReport:
    """The result of `limit_norms`: norms of alpha/rank * up @ down after it, over the modules."""

    num_scaled: int
    mean: float
    largest: float

    def metrics(self) -> dict[str, float]:
        """Under the reference tool's names."""
        return {
            "max_norm/keys_scaled": self.num_scaled,
            "max_norm/max_key_norm": self.largest,
            "norm/avg_key_norm": self.mean,
        }


@torch.no_grad()
def limit_norms(network: AdapterNetwork, max_norm: float) -> NormReport:
    """Scales every update whose Frobenius norm exceeds `max_norm` down to it, equally in down and up.

    Modules with the learning rate 0 are not changed. As in the reference tool, but synchronising with the device once.
    """
    adapters = [lora for module, lora in network.adapters() if module.learning_rate != 0]
    norms = torch.stack([lora.update_norm() for lora in adapters]).tolist()
    num_scaled = 0
    for number, (lora, norm) in enumerate(zip(adapters, norms, strict=True)):
        if norm > max_norm:
            lora.shrink(max_norm / norm)
            norms[number] = max_norm
            num_scaled += 1
    return NormReport(num_scaled, sum(norms) / len(norms), max(norms))
