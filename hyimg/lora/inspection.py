"""What `inspect-modules` shows: every module that a pattern can name, and what a network would give it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hyimg.errors import HyimgError
from hyimg.lora.formats import FORMATS, TARGETS, Format
from hyimg.lora.network_args import NetworkArgs
from hyimg.lora.optimizer_memory import optimizer_bytes, trained_parameters
from hyimg.lora.patterns import OPTION, Kind, Rule, match, matches
from hyimg.lora.plan import ModulePlan, plan_network, weak_update_warning
from hyimg.model.architecture import DiTArch
from hyimg.model.keys import linear_modules

# of a value in a file, by `--save_precision`
_VALUE_BYTES = {"float": 4, "fp16": 2, "bf16": 2}
_TARGET = {(target.block, target.original): target for target in TARGETS}


@dataclass(frozen=True)
class ModuleRow:
    """A Linear of the model. `parameters` are its own (weight and bias); rank 0 means no adapter.

    `names` are what the chosen tool calls it in LoRA files: several where that one splits it. Without a choice it is
    the model's own.
    """

    name: str
    lora_name: str
    type: str
    in_features: int
    out_features: int
    parameters: int
    rank: int
    alpha: float
    learning_rate: float | None
    names: tuple[str, ...]

    @property
    def block(self) -> tuple[str, int]:
        """The stack and the number in it: `("double_blocks", 3)`."""
        stack, number, _ = self.name.split(".", 2)
        return stack, int(number)


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

    `file_bytes` are the tensors of a LoRA file in the precision asked for, `optimizer_bytes` what the optimiser keeps
    beside float32 parameters, None where that is not known here.
    """

    modules: int
    adapted_modules: int
    parameters: int
    trainable_parameters: int
    file_bytes: int
    optimizer_bytes: int | None


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
    names: str | None = None,
    optimizer: str = "AdamW",
    save_precision: str = "bf16",
) -> Inspection:
    """The rows, totals and warnings of a model of sizes `arch`.

    `learning_rate` is what a module without a rule shows. `network_args` are `"name=value"` pairs as on the
    command line. `pattern` is a regular expression that a row's dotted or LoRA name must contain. `names` is one of
    `hyimg.lora.formats.FORMATS`. `optimizer` and `save_precision` are as in training.

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
        rows=tuple(_row(plan, learning_rate, names) for plan in shown),
        totals=_totals(plans, optimizer, save_precision),
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


def spell(module: str, format: Format) -> tuple[str, ...]:
    """What files of a format call a module of the model, by its own dotted name; a fused one may have several."""
    block, number, original = module.split(".", 2)
    target = _TARGET[block, original]
    parts = range(len(target.diffusers)) if format.spelling == "diffusers" else range(1)
    return tuple(format.module_name(target, int(number), part) for part in parts)


def _row(plan: ModulePlan, learning_rate: float | None, names: str | None) -> ModuleRow:
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
        names=(plan.name,) if names is None else spell(plan.name, FORMATS[names]),
    )


def _parameters(plan: ModulePlan) -> int:
    return (plan.in_features + 1) * plan.out_features


def _totals(plans: Sequence[ModulePlan], optimizer: str, save_precision: str) -> Totals:
    adapted = [plan for plan in plans if plan.rank]
    return Totals(
        modules=len(plans),
        adapted_modules=len(adapted),
        parameters=sum(_parameters(plan) for plan in plans),
        trainable_parameters=sum(plan.trainable_parameters for plan in adapted),
        file_bytes=sum(_file_bytes(plan, _VALUE_BYTES[save_precision]) for plan in adapted),
        optimizer_bytes=optimizer_bytes(optimizer, trained_parameters(adapted)),
    )


def _file_bytes(plan: ModulePlan, value_bytes: int) -> int:
    """Matrices and alpha in the precision that is saved, magnitudes in float32 in any case."""
    magnitudes = plan.out_features if plan.dora else 0
    return value_bytes * (plan.num_file_values - magnitudes + 1) + 4 * magnitudes


def _counts(plans: Sequence[ModulePlan], rules: Sequence[Rule], kind: Kind) -> tuple[PatternCount, ...]:
    counts = match([plan.name for plan in plans], rules).counts
    return tuple(
        PatternCount(OPTION[kind], pattern.pattern, value, count)
        for (pattern, value), count in zip(rules, counts, strict=True)
    )
