"""The network of a run: its kind of adapter (`--network_module`), ranks and initial weights, checked before the DiT is
read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.names import linear_modules
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.config.commands import TrainConfig
from hyimg.config.option import warn_of_idle
from hyimg.config.training import NetworkArgs, NetworkTraining
from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA, Magnitude
from hyimg.lora.base import Adapter, DropoutRates
from hyimg.lora.files.conversion import read_lora, require_finite
from hyimg.lora.files.foreign import weights_file
from hyimg.lora.files.formats import matching_formats, parse_key
from hyimg.lora.files.stored import LoRAFile
from hyimg.lora.merging import MergingPlacement
from hyimg.lora.network import AdapterNetwork, RateGroup
from hyimg.lora.rank_plan import (
    ModulePlan,
    parse_network_args,
    plan_from_state,
    plan_network,
    unmatched_patterns,
    weak_update_warning,
)
from hyimg.model.dit import DiT
from hyimg.model.loading import WeightPlacement
from hyimg.plugins import Plugins
from hyimg.plugins.arguments import arguments_of, bind_arguments, parse_arguments
from hyimg.plugins.guard import check_tensor, guarded
from hyimg.rendering.loras import multipliers_of
from hyimg.rendering.renderer import check_loras
from hyimg.report import Reporter, SilentReporter, count_text

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
        args = parse_network_args([pair for pair in pairs if pair not in own], also=takes)
        arguments = bind_arguments(
            found,
            parse_arguments(own, "--network_args"),
            option="--network_args",
            name=canonical,
            given=_OURS,
        )
        return NetworkKind(canonical, found, arguments), args

    def network(self, plan: Sequence[ModulePlan]) -> AdapterNetwork:
        """A network of this kind, its values not set yet."""
        return AdapterNetwork(plan, self.adapter, self.arguments)

    def num_parameters(self, plan: Sequence[ModulePlan]) -> int:
        """How many values the optimiser moves. One adapter of each shape is made, and forgotten."""
        sizes: dict[ModulePlan, int] = {}
        shapes = [replace(m, name="", learning_rate=None) for m in plan if m.rank and m.learning_rate != 0]
        for shape in shapes:
            if shape not in sizes:
                parameters = self.adapter.create(shape, **self.arguments).parameters()
                sizes[shape] = sum(p.numel() for p in parameters if p.requires_grad)
        return sum(sizes[shape] for shape in shapes)

    def check(
        self, options: NetworkTraining, args: NetworkArgs, plan: Sequence[ModulePlan], *, torch_compile: bool
    ) -> None:
        """Raises HyimgError for an option that this kind does not support, and for adapters that do not work."""
        asked = {
            "network_dropout": options.network_dropout,
            "rank_dropout": args.rank_dropout,
            "split_qkv": args.split_qkv,
            "dora": args.dora,
            "loraplus_lr_ratio": args.loraplus_lr_ratio != 1,
            "scale_weight_norms": options.scale_weight_norms,
            "dim_from_weights": options.dim_from_weights,
            "torch_compile": torch_compile,
        }
        for name, given in asked.items():
            if given and name not in self.adapter.supports:
                raise HyimgError(
                    f"{Adapter.OPTIONAL_FEATURES[name]} cannot be used with `--network_module {self.name}`: "
                    "this kind of adapter does not have it",
                    hint="leave out this option, or use `--network_module lora`",
                )
        if self.adapter is not LoRA:
            self._try(min((m for m in plan if m.rank), key=lambda m: m.in_features * m.out_features))

    def _try(self, module: ModulePlan) -> None:
        """Makes the adapter of one module and lets it act on a few rows."""
        blame = f"`--network_module {self.name}` does not work on `{module.name}`"
        width = module.out_features
        x_PI, y_PO = torch.ones(_TRIAL_ROWS, module.in_features), torch.zeros(_TRIAL_ROWS, width)
        with guarded(blame, hint="fix the plugin"):
            adapter = self.adapter.create(module, **self.arguments)
            adapter.initialize("trial", module.name)
            delta_OI, out_PO = adapter.delta(), adapter(x_PI, y_PO)
            adapter.load_tensors(adapter.tensors())
        for what, tensor, shape in (
            ("its `delta`", delta_OI, (width, module.in_features)),
            ("its output", out_PO, (_TRIAL_ROWS, width)),
        ):
            check_tensor(tensor, shape, f"{blame}: {what} is", hint="fix the plugin")
        if not out_PO.requires_grad:
            raise HyimgError(f"{blame}: it has nothing to train", hint="give it `nn.Parameter`s")

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

    def read_weights(self, path: Path, report: Reporter) -> Mapping[str, Tensor]:
        """The tensors of `--network_weights` under the names that this kind saves."""
        if self.adapter is LoRA:
            return read_lora(path)
        file = weights_file(path)
        header = read_header(file)  # says what is wrong with a damaged file
        keys = [parse_key(name) for name in header.tensors]
        if None in keys or "kohya" in matching_formats(key for key in keys if key is not None):
            return load_file(file)
        contents = LoRAFile.open(path)
        for warning in contents.warnings():
            report.warning(warning)
        return read_lora(contents, lycoris=True)


@dataclass(frozen=True)
class NetworkSetup:
    """`kind` makes the adapters, `plan` says what each module gets; `start` holds the weights to begin with under
    the names that they are saved by (None: fresh ones)."""

    kind: NetworkKind
    args: NetworkArgs
    plan: tuple[ModulePlan, ...]
    start: Mapping[str, Tensor] | None
    dropout: DropoutRates

    def build(
        self, dit: DiT, *, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> AdapterNetwork:
        """The network, attached, as it is before the first step; magnitudes are float32 whatever the dtype."""
        network = AdapterNetwork.create(
            dit, seed=seed, plan=self.plan, kind=self.kind.adapter, arguments=self.kind.arguments
        )
        if self.start is not None:
            network.load_state(self.start)
        network.set_dropout(self.dropout)
        network.to(device, dtype)
        for part in network.modules():
            if isinstance(part, Magnitude):
                part.to(torch.float32)
        network.attach(dit)
        return network

    def describe(self) -> str:
        """Size, ranks and alphas in one line."""
        adapted = [module for module in self.plan if module.rank]
        kinds = [
            kind
            for kind, used in (("DoRA", any(m.dora for m in adapted)), ("rsLoRA", self.args.rslora))
            if used
        ]
        parameters = self.kind.num_parameters(self.plan)
        name = "" if self.kind.adapter is LoRA else f"{self.kind.name}, "
        scales = _range([module.scale for module in adapted])
        return (
            f"{name}{len(adapted)} of {len(self.plan)} modules, {parameters:,} parameters, "
            f"rank {_range([module.rank for module in adapted])}, "
            f"alpha {_range([module.alpha for module in adapted])} (alpha/rank {scales})"
            + "".join(f", {kind}" for kind in kinds)
        )


def prepare_network(config: TrainConfig, arch: DiTArch, plugins: Plugins, report: Reporter) -> NetworkSetup:
    """Reads what `--network_args` and the files of `--network_weights` and `--base_weights` say.

    Raises HyimgError for the first thing that is wrong; of the base weights only headers are read.
    """
    options, shape = config.network_training, config.network
    kind, args = NetworkKind.resolve(plugins, options.network_module, shape.network_args)
    modules = linear_modules(arch)
    for warning in unmatched_patterns(args, modules, strict=shape.strict_patterns):
        report.warning(f"{warning} (`hyimg inspect-modules` lists the names)")
    if options.network_dropout >= 1:
        raise HyimgError(
            "`--network_dropout 1` drops everything", hint="give a probability below 1; 0.1 is usual"
        )
    if config.saving.ema_decay == 1:
        raise HyimgError(
            "`--ema_decay 1` would never update the average", hint="give a number below 1; 0.999 is usual"
        )
    _base_multipliers(options, report)
    check_loras(options.base_weights, arch, report)
    start = _start_weights(options.network_weights, kind, arch, report)
    if options.dim_from_weights:
        plan = _plan_from_weights(options.network_weights, arch, start, args)
    else:
        plan = plan_network(modules, dim=shape.network_dim, alpha=shape.network_alpha, args=args)
    _require_work(plan)
    kind.check(options, args, plan, torch_compile=config.memory.torch_compile)
    if any(module.dora for module in plan):
        report.note(
            "DoRA: ComfyUI sets rows to a slightly other length until its pull request 15458; hyimg, LyCORIS and "
            "PEFT do as trained, and the reference tool leaves the lengths out"
        )
    if start is not None and (problem := kind.network(plan).mismatch(start)):
        way_out = "`--dim_from_weights`, or " if "dim_from_weights" in kind.adapter.supports else ""
        raise HyimgError(
            f"`{options.network_weights}` does not fit the network: {problem}",
            hint=f"give {way_out}the `--network_dim`, patterns and `--network_args` that it was trained with",
        )
    _warn_of_scale(config, kind, plan, start, report)
    rates = DropoutRates(options.network_dropout, args.rank_dropout, args.module_dropout)
    return NetworkSetup(kind, args, plan, start, rates)


def merging_placement(
    options: NetworkTraining, arch: DiTArch, placement: WeightPlacement, report: Reporter
) -> WeightPlacement:
    """The placement that merges `--base_weights` before `placement`; that itself where there are none.

    Raises HyimgError for a file that does not fit, or whose weights are not finite.
    """
    merges = []
    multipliers = _base_multipliers(options, SilentReporter())
    for path, multiplier in zip(options.base_weights, multipliers, strict=True):
        network = AdapterNetwork.read(path, arch)
        merges.append((network, multiplier))
        report.note(
            f"merging {path} into the base: {count_text(len(network.plan), 'module')}, multiplier {multiplier:g}"
        )
    return MergingPlacement(placement, merges) if merges else placement


def describe_rates(groups: Sequence[RateGroup]) -> str:
    """The optimiser's groups in a line, under their names in the metrics."""
    parts = []
    for number, group in enumerate(groups):
        name = f"learning_rate_{number}" if number else "learning_rate"
        what = f" ({group.role})" if group.role else ""
        parts.append(f"{name} {group.lr:g} for {len(group.parameters)} tensors{what}")
    return f"{count_text(len(groups), 'parameter group')}: " + ", ".join(parts)


def _base_multipliers(options: NetworkTraining, report: Reporter) -> Sequence[float]:
    return multipliers_of(
        options.base_weights,
        options.base_weights_multiplier,
        report,
        option="--base_weights_multiplier",
        files_option="--base_weights",
    )


def _start_weights(
    path: Path | None, kind: NetworkKind, arch: DiTArch, report: Reporter
) -> Mapping[str, Tensor] | None:
    """The weights of `--network_weights`, which are small and so are read at once."""
    if path is None:
        return None
    if kind.adapter is LoRA:
        check_loras([path], arch, report)
    state = kind.read_weights(path, report)
    require_finite(path, state)
    return state


def _plan_from_weights(
    path: Path | None, arch: DiTArch, start: Mapping[str, Tensor] | None, args: NetworkArgs
) -> tuple[ModulePlan, ...]:
    if start is None:
        raise HyimgError(
            "`--dim_from_weights` needs `--network_weights`", hint="give the file with the ranks"
        )
    for name, given in (("network_reg_dims", args.network_reg_dims), ("rslora", args.rslora)):
        if given:
            raise HyimgError(
                f"`{name}` in `--network_args` and `--dim_from_weights` both set the ranks or their scale",
                hint="use only one of the two",
            )
    plan = plan_from_state(linear_modules(arch), start, args)
    if args.dora and not any(module.dora for module in plan):
        raise HyimgError(
            f"`dora=True` with `--dim_from_weights`: `{path}` is not a DoRA",
            hint="use only one of the two",
        )
    return plan


def _require_work(plan: Sequence[ModulePlan]) -> None:
    if not any(module.rank for module in plan):
        raise HyimgError(
            "the network is empty: every module has the rank 0",
            hint="a pattern in `network_reg_dims` must leave at least one module a rank",
        )
    if not any(module.trainable_parameters for module in plan):
        raise HyimgError(
            "there is nothing to train: every module has the learning rate 0",
            hint="a pattern in `network_reg_lrs` must leave at least one module a rate",
        )


def _warn_of_scale(
    config: TrainConfig,
    kind: NetworkKind,
    plan: Sequence[ModulePlan],
    start: Mapping[str, Tensor] | None,
    report: Reporter,
) -> None:
    """What alpha does, where it may not be what was meant."""
    options, alpha = config.network_training, config.network.network_alpha
    if start is not None and not options.dim_from_weights:
        own = kind.network(plan).state()
        names = [name for name in start if name.endswith(".alpha")]
        if any(float(start[name]) != float(own[name]) for name in names):
            given = " and ".join(f"{value:g}" for value in sorted({float(start[name]) for name in names}))
            report.note(f"alpha is {given}, from `{options.network_weights}`")
            warn_of_idle(config, report, alpha_is_used=False)
            return
    if not options.dim_from_weights and (warning := weak_update_warning(plan, alpha=alpha)):
        report.warning(warning)


def _range(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
