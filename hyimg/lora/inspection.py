"""What `inspect-modules` shows: every module that a pattern can name, and what a network would give it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hyimg.errors import HyimgError
from hyimg.lora.network_args import NetworkArgs
from hyimg.lora.patterns import OPTION, Kind, Rule, match, matches
from hyimg.lora.plan import ModulePlan, plan_network, weak_update_warning
from hyimg.model.architecture import DiTArch
from hyimg.model.keys import linear_modules

ALPHA_BYTES = 4


@dataclass(frozen=True)
class ModuleRow:
    """A Linear of the model. `parameters` are its own (weight and bias); rank 0 means no adapter."""

    name: str
    lora_name: str
    type: str
    in_features: int
    out_features: int
    parameters: int
    rank: int
    alpha: float
    learning_rate: float | None


@dataclass(frozen=True)
class PatternCount:
    """How many modules a pattern matches, whether or not a later pattern overrules it."""

    option: str
    pattern: str
    value: float
    num_modules: int


@dataclass(frozen=True)
class Totals:
    """Sums over the whole network, whatever filter the rows passed.

    `file_bytes` is the LoRA file's tensors in float32, `optimizer_bytes` the two float32 moments of AdamW.
    """

    modules: int
    adapted_modules: int
    parameters: int
    trainable_parameters: int
    file_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Inspection:
    """`rows` in model order, those only that the filter lets through."""

    rows: tuple[ModuleRow, ...]
    totals: Totals
    patterns: tuple[PatternCount, ...]
    warnings: tuple[str, ...]


def inspect(
    arch: DiTArch,
    *,
    dim: int = 4,
    alpha: float = 1.0,
    learning_rate: float | None = None,
    network_args: Sequence[str] = (),
    pattern: str | None = None,
    strict: bool = False,
) -> Inspection:
    """The rows, totals and warnings of a model of sizes `arch`.

    `learning_rate` is what a module without a rule shows. `network_args` are `"name=value"` pairs as on the
    command line. `pattern` is a regular expression that a row's dotted or LoRA name must contain.

    Raises `HyimgError` for an invalid pattern or argument, and with `strict` for a pattern without a match.
    """
    modules = linear_modules(arch)
    args = NetworkArgs.parse(network_args)
    warnings = args.warnings(modules, strict=strict)
    plans = plan_network(modules, dim=dim, alpha=alpha, args=args)
    if weak := weak_update_warning(plans, alpha=alpha):
        warnings.append(weak)
    shown = _filter(plans, pattern)
    return Inspection(
        rows=tuple(_row(plan, learning_rate) for plan in shown),
        totals=_totals(plans),
        patterns=_counts(plans, args.rank_rules, "rank")
        + _counts(plans, args.learning_rate_rules, "learning rate"),
        warnings=tuple(warnings),
    )


def _filter(plans: Sequence[ModulePlan], pattern: str | None) -> Sequence[ModulePlan]:
    try:
        compiled = re.compile(pattern or "")
    except re.error as error:
        raise HyimgError(f"`{pattern}` is not a valid regular expression: {error}") from error
    return [plan for plan in plans if matches(compiled, plan.name)]


def _row(plan: ModulePlan, learning_rate: float | None) -> ModuleRow:
    return ModuleRow(
        name=plan.name,
        lora_name=plan.lora_name,
        type="Linear",
        in_features=plan.in_features,
        out_features=plan.out_features,
        parameters=_parameters(plan),
        rank=plan.rank,
        alpha=plan.alpha,
        learning_rate=learning_rate if plan.learning_rate is None else plan.learning_rate,
    )


def _parameters(plan: ModulePlan) -> int:
    return (plan.in_features + 1) * plan.out_features


def _totals(plans: Sequence[ModulePlan]) -> Totals:
    adapted = [plan for plan in plans if plan.rank]
    trainable = sum(plan.trainable_parameters for plan in adapted)
    return Totals(
        modules=len(plans),
        adapted_modules=len(adapted),
        parameters=sum(_parameters(plan) for plan in plans),
        trainable_parameters=trainable,
        file_bytes=sum(4 * plan.num_file_values + ALPHA_BYTES for plan in adapted),
        optimizer_bytes=8 * trainable,
    )


def _counts(plans: Sequence[ModulePlan], rules: Sequence[Rule], kind: Kind) -> tuple[PatternCount, ...]:
    counts = match([plan.name for plan in plans], rules).counts
    return tuple(
        PatternCount(OPTION[kind], pattern.pattern, value, count)
        for (pattern, value), count in zip(rules, counts, strict=True)
    )
