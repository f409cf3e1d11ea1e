"""`--network_module`: the kind of adapter that a network is made of, built in or a plugin's, checked beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hyimg.config.commands import TrainConfig
from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA
from hyimg.lora.base import Adapter
from hyimg.lora.file import read_lora
from hyimg.lora.formats import matching_formats, parse_key
from hyimg.lora.network import LoRANetwork
from hyimg.lora.network_args import NetworkArgs
from hyimg.lora.plan import ModulePlan
from hyimg.model.safetensors_file import read_header
from hyimg.plugins import Plugins, bind_arguments, describe, parse_arguments
from hyimg.plugins.arguments import arguments_of
from hyimg.report import Reporter

_OURS = ("rank", "alpha")
_TRIAL_ROWS = 4


@dataclass(frozen=True)
class NetworkKind:
    """The name that was given, the class of its adapters, and what `--network_args` sets of each."""

    name: str
    adapter: type[Adapter] = LoRA
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def resolve(plugins: Plugins, name: str, pairs: Sequence[str]) -> tuple[NetworkKind, NetworkArgs]:
        """The kind of that name in any case, and the part of `--network_args` that every kind shares.

        Raises HyimgError for an unknown name, for what is no kind of adapter, and for a wrong argument.
        """
        canonical = plugins.canonical("networks", name)
        found: Callable[..., Any] = plugins.resolve("networks", name)
        if not (isinstance(found, type) and issubclass(found, Adapter)):
            raise HyimgError(
                f"`--network_module` `{canonical}` is no kind of adapter",
                hint="a plugin gives a subclass of `hyimg.lora.base.Adapter`",
            )
        takes = [argument for argument in arguments_of(found) if argument not in _OURS]
        own = [pair for pair in pairs if pair.partition("=")[0].strip() in takes]
        args = NetworkArgs.parse([pair for pair in pairs if pair not in own], also=takes)
        arguments = bind_arguments(
            found,
            parse_arguments(own, "--network_args"),
            option="--network_args",
            name=canonical,
            given=_OURS,
        )
        return NetworkKind(canonical, found, arguments), args

    def network(self, plan: Sequence[ModulePlan]) -> LoRANetwork:
        """A network of this kind, its values not set yet."""
        return LoRANetwork(plan, self.adapter, self.arguments)

    def num_parameters(self, plan: Sequence[ModulePlan]) -> int:
        """How many values the optimiser moves. One adapter of each shape is made, and forgotten."""
        sizes: dict[ModulePlan, int] = {}
        shapes = [replace(m, name="", learning_rate=None) for m in plan if m.rank and m.learning_rate != 0]
        for shape in shapes:
            if shape not in sizes:
                parameters = self.adapter.create(shape, **self.arguments).parameters()
                sizes[shape] = sum(p.numel() for p in parameters if p.requires_grad)
        return sum(sizes[shape] for shape in shapes)

    def check(self, config: TrainConfig, args: NetworkArgs, plan: Sequence[ModulePlan]) -> None:
        """Raises HyimgError for an option that this kind cannot follow, and for adapters that do not work."""
        options = config.network_training
        asked = {
            "network_dropout": options.network_dropout,
            "rank_dropout": args.rank_dropout,
            "split_qkv": args.split_qkv,
            "dora": args.dora,
            "loraplus_lr_ratio": args.loraplus_lr_ratio != 1,
            "scale_weight_norms": options.scale_weight_norms,
            "dim_from_weights": options.dim_from_weights,
            "torch_compile": config.memory.torch_compile,
        }
        for name, given in asked.items():
            if given and name not in self.adapter.honours:
                raise HyimgError(
                    f"{Adapter.OPTIONAL[name]} cannot be used with `--network_module {self.name}`: "
                    "this kind of adapter does not have it",
                    hint="leave it out, or use `--network_module lora`",
                )
        if self.adapter is not LoRA:
            self._try(min((m for m in plan if m.rank), key=lambda m: m.in_features * m.out_features))

    def _try(self, module: ModulePlan) -> None:
        """Makes the adapter of one module and lets it act on a few rows."""
        blame = f"`--network_module {self.name}` does not work on `{module.name}`"
        width = module.out_features
        x_PI, y_PO = torch.ones(_TRIAL_ROWS, module.in_features), torch.zeros(_TRIAL_ROWS, width)
        try:
            adapter = self.adapter.create(module, **self.arguments)
            adapter.initialize("trial", module.name)
            delta_OI, out_PO = adapter.delta(), adapter(x_PI, y_PO)
            adapter.load_tensors(adapter.tensors())
        except HyimgError:
            raise
        except Exception as error:
            raise HyimgError(f"{blame}: {describe(error)}", hint="mend the plugin") from error
        for what, tensor, shape in (
            ("its `delta`", delta_OI, (width, module.in_features)),
            ("its output", out_PO, (_TRIAL_ROWS, width)),
        ):
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
                given = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise HyimgError(f"{blame}: {what} is {given}, not {list(shape)}", hint="mend the plugin")
        if not out_PO.requires_grad:
            raise HyimgError(f"{blame}: nothing of it can be trained", hint="give it `nn.Parameter`s")

    def save_format(self, asked: str, plan: Sequence[ModulePlan], report: Reporter) -> str:
        """`--save_format`, where this kind's tensors have no names in ComfyUI's form the reference tool's alone.

        Says so, and raises HyimgError where ComfyUI's form alone is asked for.
        """
        module = next(m for m in plan if m.rank)
        ends = self.adapter.create(module, **self.arguments).tensors()
        strange = [end for end in ends if parse_key(f"{module.lora_name}.{end}") is None]
        if strange and asked == "comfy":
            raise HyimgError(
                f"`--save_format comfy` cannot hold `--network_module {self.name}`: ComfyUI has no name for "
                f"`{strange[0]}`",
                hint="give `--save_format kohya`",
            )
        if strange and asked == "both":
            report.note(
                f"ComfyUI has no name for `{strange[0]}`: files are saved in the reference tool's form alone"
            )
        return "kohya" if strange else asked

    def read_weights(self, path: Path) -> Mapping[str, Tensor]:
        """The tensors of `--network_weights` under the names that this kind saves."""
        if self.adapter is LoRA:
            return read_lora(path)
        header = read_header(path)  # says what is wrong with a damaged file
        keys = [parse_key(name) for name in header.tensors]
        if None in keys or "kohya" in matching_formats(key for key in keys if key is not None):
            return load_file(path)
        return read_lora(path, lycoris=True)
