"""The contents of `inspect-modules`: every module that a pattern can match, and its adapter. No torch.

Consecutive blocks with equal rows are shown once. The size of an optimiser's state is computed from the shapes of the
float32 parameters, with its default arguments; `tests/lora/test_optimizer_memory.py` compares the table with the
optimisers themselves. Scalars per tensor and the two code tables (1 kB each) of 8-bit states are not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.names import BLOCK_LINEARS, linear_modules
from hyimg.lora.files.formats import FORMATS, Format
from hyimg.lora.patterns import OPTION, PatternKind, Rule, compile_pattern, match, matches
from hyimg.lora.rank_plan import (
    ModulePlan,
    learning_rate_rules,
    parse_network_args,
    plan_network,
    rank_rules,
    unmatched_patterns,
    weak_update_warning,
)

# bitsandbytes: below so many values a state stays in float32, above it has a float32 scale for each block
_MIN_8BIT_VALUES = 4096
_8BIT_BLOCK = 256


@dataclass(frozen=True)
class TrainedParameter:
    """A tensor that is trained; up matrices start at zero."""

    shape: tuple[int, ...]
    starts_at_zero: bool = False

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _State:
    """How many of each an optimiser keeps for a parameter.

    `full` float32 copies, `eight_bit` copies in 8 bits, `factored` pairs of a value a row and a value a column (a
    copy where there are no two dimensions), `starts` copies of start values, none where those are zero.
    """

    full: int = 0
    eight_bit: int = 0
    factored: int = 0
    starts: int = 0

    def num_bytes(self, parameter: TrainedParameter) -> int:
        num = parameter.num_values
        copies = self.full + (0 if parameter.starts_at_zero else self.starts)
        if num < _MIN_8BIT_VALUES:
            of_8bit = 4 * num
        else:
            of_8bit = num + 4 * math.ceil(num / _8BIT_BLOCK)
        shape = parameter.shape
        pair = num // shape[-1] + num // shape[-2] if len(shape) > 1 else num
        return 4 * copies * num + self.eight_bit * of_8bit + 4 * self.factored * pair


_STATES = {
    "adamw": _State(full=2),
    "adamw8bit": _State(eight_bit=2),
    "pagedadamw": _State(full=2),
    "pagedadamw8bit": _State(eight_bit=2),
    "pagedadamw32bit": _State(full=2),
    "ademamix8bit": _State(eight_bit=3),
    "pagedademamix8bit": _State(eight_bit=3),
    "adafactor": _State(factored=1),
    "lion": _State(full=1),
    "lion8bit": _State(eight_bit=1),
    "pagedlion8bit": _State(eight_bit=1),
    "prodigy": _State(full=3, starts=1),
    "dadaptation": _State(full=3),
    "dadaptadampreprint": _State(full=3),
    "dadaptadam": _State(full=3),
    "dadaptadagrad": _State(full=3),
    "dadaptadan": _State(full=5),
    "dadaptadanip": _State(full=5),
    "dadaptlion": _State(full=2),
    "dadaptsgd": _State(full=3),
    "came": _State(full=1, factored=2),
    "adamwschedulefree": _State(full=2),
    "radamschedulefree": _State(full=2),
    "sgdschedulefree": _State(full=1),
    "sgdnesterov": _State(full=1),
    "sgdnesterov8bit": _State(eight_bit=1),
}


def optimizer_bytes(optimizer: str, parameters: Iterable[TrainedParameter]) -> int | None:
    """The size of the state of a built-in optimiser (any case); None for another one."""
    state = _STATES.get(optimizer.lower())
    return None if state is None else sum(state.num_bytes(parameter) for parameter in parameters)


def trained_parameters(plans: Iterable[ModulePlan]) -> Iterator[TrainedParameter]:
    """The tensors that a network of these modules hands to its optimiser."""
    for plan in plans:
        if plan.rank == 0 or plan.learning_rate == 0:
            continue
        for height in plan.parts or (plan.out_features,):
            yield TrainedParameter((plan.rank, plan.in_features))
            yield TrainedParameter((height, plan.rank), starts_at_zero=True)
        if plan.dora:
            yield TrainedParameter((plan.out_features, 1))


# of a value in a file, by `--save_precision`
_VALUE_BYTES = {"float": 4, "fp16": 2, "bf16": 2}
_LINEARS = {(linear.block, linear.original): linear for linear in BLOCK_LINEARS}


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
    `hyimg.lora.files.formats.FORMATS`. `optimizer` and `save_precision` are as in training.

    Raises `HyimgError` for an invalid pattern or argument, and with `strict` for a pattern without a match.
    """
    modules = linear_modules(arch)
    args = parse_network_args(network_args)
    warnings = unmatched_patterns(args, modules, strict=strict)
    plans = plan_network(modules, dim=dim, alpha=alpha, args=args)
    if weak := weak_update_warning(plans, alpha=alpha):
        warnings.append(weak)
    shown = _filter(plans, pattern)
    return Inspection(
        rows=tuple(_row(plan, learning_rate, names) for plan in shown),
        totals=_totals(plans, optimizer, save_precision),
        patterns=_counts(plans, rank_rules(args), "rank")
        + _counts(plans, learning_rate_rules(args), "learning rate"),
        warnings=tuple(warnings),
    )


def _filter(plans: Sequence[ModulePlan], pattern: str | None) -> Sequence[ModulePlan]:
    compiled = compile_pattern(pattern or "", "--pattern")
    return [plan for plan in plans if matches(compiled, plan.name)]


def spell(module: str, format: Format) -> tuple[str, ...]:
    """What files of a format call a module of the model, by its own dotted name; a fused one may have several."""
    block, number, original = module.split(".", 2)
    linear = _LINEARS[block, original]
    parts = range(len(linear.diffusers)) if format.splits_rows else range(1)
    return tuple(format.module_name(linear, int(number), part) for part in parts)


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


def _counts(
    plans: Sequence[ModulePlan], rules: Sequence[Rule], kind: PatternKind
) -> tuple[PatternCount, ...]:
    counts = match([plan.name for plan in plans], rules).counts
    return tuple(
        PatternCount(OPTION[kind], pattern.pattern, value, count)
        for (pattern, value), count in zip(rules, counts, strict=True)
    )


@dataclass(frozen=True)
class BlockRange:
    """Blocks `first` to `last` of a stack, of which each has `rows`, given as those of the first."""

    stack: str
    first: int
    last: int
    rows: tuple[ModuleRow, ...]

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    @property
    def title(self) -> str:
        """What the names of all its rows begin with, in their spelling: `double_blocks.0..19`."""
        head, _ = _split(self.rows[0].names[0])
        return re.sub(r"\d+$", self._numbers, head)

    @property
    def _numbers(self) -> str:
        return f"{self.first}..{self.last}" if self.count > 1 else str(self.first)


def block_ranges(rows: Iterable[ModuleRow]) -> list[BlockRange]:
    """The blocks of `rows` (in model order); a range ends where a block has other modules, ranks, alphas or rates."""
    ranges: list[BlockRange] = []
    for (stack, number), group in groupby(rows, key=lambda row: row.block):
        block = tuple(group)
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and (last.stack, last.last) == (stack, number - 1)
            and _content(last.rows) == _content(block)
        ):
            ranges[-1] = replace(last, last=number)
        else:
            ranges.append(BlockRange(stack, number, number, block))
    return ranges


def ends(row: ModuleRow) -> tuple[str, ...]:
    """The row's names without the block: `img_attn_qkv`, or `attn.to_q`, `attn.to_k`, `attn.to_v`."""
    return tuple(_split(name)[1] for name in row.names)


def _content(rows: Sequence[ModuleRow]) -> list[ModuleRow]:
    """The rows with nothing left in them that tells the block."""
    return [replace(row, name=row.name.split(".", 2)[2], lora_name="", names=()) for row in rows]


def _split(name: str) -> tuple[str, str]:
    """A module's name, cut after the number of its block."""
    match = re.match(r"(.*?blocks[._]\d+)[._](.*)", name)
    assert match is not None, name
    return match[1], match[2]


def leaves(block: BlockRange) -> Iterator[tuple[str, ModuleRow, str]]:
    """(branch, row, name's end) for each line below the block's own; a split module has a line a part."""
    lines = [(row, end) for row in block.rows for end in ends(row)]
    for number, (row, end) in enumerate(lines):
        yield ("└── " if number == len(lines) - 1 else "├── "), row, end
