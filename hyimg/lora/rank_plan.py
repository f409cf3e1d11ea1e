"""Which modules get an adapter, of which rank and learning rate, by `--network_args`; nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hyimg.checkpoints.names import BLOCK_LINEARS, ModuleInfo
from hyimg.config.training import UNSUPPORTED_NETWORK_ARGS, NetworkArgs
from hyimg.errors import HyimgError
from hyimg.lora.files.formats import lora_name
from hyimg.lora.patterns import Rule, match, parse_patterns, unmatched
from hyimg.plugins.arguments import parse_options


def parse_network_args(pairs: Sequence[str], *, also: Sequence[str] = ()) -> NetworkArgs:
    """`--network_args`, read and checked; `also` are arguments of the kind of network, which its class takes.

    Raises HyimgError for an unknown or unsupported name, and for a wrong value; patterns are read by `plan_network`.
    """
    args = parse_options(
        NetworkArgs, pairs, "--network_args", also=also, unsupported=UNSUPPORTED_NETWORK_ARGS
    )
    return replace(args, loraplus_lr_ratio=args.loraplus_unet_lr_ratio or args.loraplus_lr_ratio)


def rank_rules(args: NetworkArgs) -> list[Rule]:
    """The rules of `network_reg_dims`; raises HyimgError for a pattern or a rank that is not one."""
    return parse_patterns(args.network_reg_dims, "rank")


def learning_rate_rules(args: NetworkArgs) -> list[Rule]:
    """The rules of `network_reg_lrs`; raises HyimgError for a pattern or a rate that is not one."""
    return parse_patterns(args.network_reg_lrs, "learning rate")


def unmatched_patterns(
    args: NetworkArgs, modules: Sequence[ModuleInfo], *, strict: bool = False
) -> list[str]:
    """A sentence for each pattern that matches no module; with `strict` the first is an error."""
    names = [module.name for module in modules]
    sentences = unmatched(names, rank_rules(args), "rank")
    sentences += unmatched(names, learning_rate_rules(args), "learning rate")
    if strict and sentences:
        raise HyimgError(
            sentences[0], hint="`hyimg inspect-modules` lists the names that a pattern can match"
        )
    return sentences


WEAK_FACTOR = 16
"""How many times weaker than with alpha = rank an update may be before it is worth a warning."""


@dataclass(frozen=True)
class ModulePlan:
    """What a module gets. Rank 0 is no adapter; `learning_rate` None is the run's, 0 freezes the adapter.

    The update is alpha/rank * up @ down, also with rsLoRA: there `alpha` is sqrt(rank) times the one given.
    `parts` are the heights of the row ranges that have adapters of their own, each of this rank and alpha;
    empty for one adapter for all rows. `dora` adds a magnitude for each row.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    learning_rate: float | None = None
    parts: tuple[int, ...] = ()
    dora: bool = False

    @property
    def lora_name(self) -> str:
        """The reference tool's name of the adapter."""
        return lora_name(self.name)

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    @property
    def trainable_parameters(self) -> int:
        """Values that the optimiser moves."""
        return 0 if self.learning_rate == 0 else self.num_values

    @property
    def num_values(self) -> int:
        """Values in down, up and magnitude."""
        matrices = self.rank * (self.in_features * max(1, len(self.parts)) + self.out_features)
        return matrices + self._num_magnitudes

    @property
    def num_file_values(self) -> int:
        """The same as a file holds them: there a split adapter is one of the summed rank."""
        rank = self.rank * max(1, len(self.parts))
        return rank * (self.in_features + self.out_features) + self._num_magnitudes

    @property
    def _num_magnitudes(self) -> int:
        return self.out_features if self.dora and self.rank else 0


def plan_network(
    modules: Sequence[ModuleInfo],
    *,
    dim: int = 4,
    alpha: float = 1.0,
    args: NetworkArgs | None = None,
) -> tuple[ModulePlan, ...]:
    """A plan for each of `modules`, in their order; the given alpha is the same whatever the rank."""
    args = args or NetworkArgs()
    ranks = match([module.name for module in modules], rank_rules(args)).values
    plans = [
        _plan(module, args, dim if rank is None else int(rank), alpha)
        for module, rank in zip(modules, ranks, strict=True)
    ]
    return _with_rates(plans, args)


def plan_from_state(
    modules: Sequence[ModuleInfo], state: Mapping[str, Any], args: NetworkArgs | None = None
) -> tuple[ModulePlan, ...]:
    """A plan for each of `modules` with the ranks, alphas and magnitudes of weights that are there.

    `state` holds tensors under the reference tool's names; a module that it does not have gets rank 0.
    Raises `HyimgError` for a rank that `split_qkv` cannot divide.
    """
    args = args or NetworkArgs()
    plans = []
    for module in modules:
        name = lora_name(module.name)
        down = state.get(f"{name}.lora_down.weight")
        rank = 0 if down is None else len(down)
        alpha = state.get(f"{name}.alpha")
        own = replace(args, rslora=False, dora=f"{name}.dora_scale" in state)  # alpha holds the scale already
        plan = _plan(module, own, rank, float(rank if alpha is None else alpha))
        if num_parts := len(plan.parts):
            if rank % num_parts:
                raise HyimgError(
                    f"the rank {rank} of `{module.name}` is no multiple of {num_parts}, so that it is not split",
                    hint="leave `split_qkv` out, or give a file that was trained with it",
                )
            plan = replace(plan, rank=rank // num_parts, alpha=plan.alpha / num_parts)
        plans.append(plan)
    return _with_rates(plans, args)


def row_ranges(module: ModuleInfo) -> tuple[int, ...]:
    """The heights of the parts that are fused in a module's weight: q, k, v and the MLP; empty for one part."""
    for linear in BLOCK_LINEARS:
        if module.name.startswith(linear.block) and module.name.endswith(f".{linear.original}"):
            if len(linear.part_widths) == 1:
                return ()
            hidden = module.in_features
            mlp = module.out_features - linear.out_width[0] * hidden
            return tuple(width[0] * hidden + width[1] * mlp for width in linear.part_widths)
    raise AssertionError(module.name)


def weak_update_warning(plan: Sequence[ModulePlan], *, alpha: float) -> str | None:
    """A sentence where the given alpha makes updates `WEAK_FACTOR` or more times weaker than a scale of 1."""
    weak = [module for module in plan if module.rank and module.scale <= 1 / WEAK_FACTOR]
    if not weak:
        return None
    weakest = min(weak, key=lambda module: module.scale)
    where = "" if len(weak) == sum(1 for m in plan if m.rank) else f" of {len(weak)} modules"
    factor = 1 / weakest.scale
    return (
        f"alpha {alpha:g} with rank {weakest.rank} makes the update{where} {factor:.4g} times weaker than "
        f"`--network_alpha {alpha * factor:.4g}` would: give that, unless it is meant"
    )


def _plan(module: ModuleInfo, args: NetworkArgs, rank: int, alpha: float) -> ModulePlan:
    return ModulePlan(
        module.name,
        module.in_features,
        module.out_features,
        rank,
        alpha * math.sqrt(rank) if args.rslora and rank else alpha,
        parts=row_ranges(module) if args.split_qkv and rank else (),
        dora=args.dora and rank > 0,
    )


def _with_rates(plans: Sequence[ModulePlan], args: NetworkArgs) -> tuple[ModulePlan, ...]:
    rates = match([plan.name for plan in plans], learning_rate_rules(args)).values
    return tuple(replace(plan, learning_rate=rate) for plan, rate in zip(plans, rates, strict=True))
