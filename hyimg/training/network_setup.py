"""The network of a run: what the options and the files to start from make of it, checked before the DiT is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyimg.config.commands import TrainConfig
from hyimg.errors import HyimgError
from hyimg.flow.renderer import check_loras
from hyimg.lora.adapter import LoRA
from hyimg.lora.dropout import DropoutRates
from hyimg.lora.file import require_finite
from hyimg.lora.magnitude import Magnitude
from hyimg.lora.merge import MergingPlacement
from hyimg.lora.network import LoRANetwork, RateGroup
from hyimg.lora.network_args import NetworkArgs
from hyimg.lora.plan import ModulePlan, plan_from_state, plan_network, weak_update_warning
from hyimg.model.architecture import DiTArch
from hyimg.model.dit import DiT
from hyimg.model.keys import linear_modules
from hyimg.model.loading import Placement
from hyimg.plugins import Plugins
from hyimg.report import Reporter, count_text
from hyimg.training.network_kind import NetworkKind


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
    ) -> LoRANetwork:
        """The network, attached, as it is before the first step; magnitudes are float32 whatever the dtype."""
        network = LoRANetwork.create(
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
        """Size, ranks and alphas in a line."""
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
    for warning in args.warnings(modules, strict=shape.strict_patterns):
        report.warning(f"{warning} (`hyimg inspect-modules` lists the names)")
    if options.network_dropout >= 1:
        raise HyimgError(
            "`--network_dropout 1` drops everything", hint="give a probability below 1; 0.1 is usual"
        )
    if config.saving.ema_decay == 1:
        raise HyimgError(
            "`--ema_decay 1` never takes a step in", hint="give a number below 1; 0.999 is usual"
        )
    _base_multipliers(config)
    check_loras(options.base_weights, arch)
    start = _start_weights(config, kind, arch)
    if options.dim_from_weights:
        plan = _plan_from_weights(config, arch, start, args)
    else:
        plan = plan_network(modules, dim=shape.network_dim, alpha=shape.network_alpha, args=args)
    _require_work(plan)
    kind.check(config, args, plan)
    if any(module.dora for module in plan):
        report.note(
            "DoRA: ComfyUI sets rows to a slightly other length until its pull request 15458; hyimg, LyCORIS and "
            "PEFT do as trained, and the reference tool leaves the lengths out"
        )
    if start is not None and (problem := kind.network(plan).misfit(start)):
        way_out = "`--dim_from_weights`, or " if "dim_from_weights" in kind.adapter.honours else ""
        raise HyimgError(
            f"`{options.network_weights}` does not fit the network: {problem}",
            hint=f"give {way_out}the `--network_dim`, patterns and `--network_args` that it was trained with",
        )
    _warn_of_scale(config, kind, plan, start, report)
    rates = DropoutRates(options.network_dropout, args.rank_dropout, args.module_dropout)
    return NetworkSetup(kind, args, plan, start, rates)


def merging_placement(
    config: TrainConfig, arch: DiTArch, placement: Placement, report: Reporter
) -> Placement:
    """The placement that merges `--base_weights` before `placement`; that itself where there are none.

    Raises HyimgError for a file that does not fit, or whose weights are not finite.
    """
    merges = []
    for path, multiplier in zip(config.network_training.base_weights, _base_multipliers(config), strict=True):
        network = LoRANetwork.read(path, arch)
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


def _base_multipliers(config: TrainConfig) -> Sequence[float]:
    options = config.network_training
    num_files, num_multipliers = len(options.base_weights), len(options.base_weights_multiplier)
    if num_multipliers and num_multipliers != num_files:
        raise HyimgError(
            f"{count_text(num_multipliers, 'value')} of `--base_weights_multiplier` for "
            f"{count_text(num_files, 'file')} of `--base_weights`",
            hint="give one for each file, or none (1)",
        )
    return options.base_weights_multiplier or (1.0,) * num_files


def _start_weights(config: TrainConfig, kind: NetworkKind, arch: DiTArch) -> Mapping[str, Tensor] | None:
    """The weights of `--network_weights`, which are small and so are read at once."""
    path: Path | None = config.network_training.network_weights
    if path is None:
        return None
    if kind.adapter is LoRA:
        check_loras([path], arch)
    state = kind.read_weights(path)
    require_finite(path, state)
    return state


def _plan_from_weights(
    config: TrainConfig, arch: DiTArch, start: Mapping[str, Tensor] | None, args: NetworkArgs
) -> tuple[ModulePlan, ...]:
    if start is None:
        raise HyimgError(
            "`--dim_from_weights` needs `--network_weights`", hint="name the file with the ranks"
        )
    for name, given in (("network_reg_dims", args.rank_rules), ("rslora", args.rslora)):
        if given:
            raise HyimgError(
                f"`{name}` in `--network_args` and `--dim_from_weights` both say the ranks or their scale",
                hint="leave one of the two out",
            )
    plan = plan_from_state(linear_modules(arch), start, args)
    if args.dora and not any(module.dora for module in plan):
        raise HyimgError(
            f"`dora=True` with `--dim_from_weights`: `{config.network_training.network_weights}` is no DoRA",
            hint="leave one of the two out",
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
            report.warning(
                f"alpha is {given}, from `{options.network_weights}`; `--network_alpha` is not used"
            )
            return
    if not options.dim_from_weights and (warning := weak_update_warning(plan, alpha=alpha)):
        report.warning(warning)


def _range(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
