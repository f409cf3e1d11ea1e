"""How an option is declared, which options a config has, and which of those given have no effect.

    @dataclass(frozen=True, kw_only=True)
    class LossOptions:
        '''Loss.'''

        huber_c: float = option(0.1, above=0, help="Huber threshold", needs=(Unless("loss_type", "l1", "l2"),))

The field's name is the flag (`--huber_c`, dashes too), the TOML key and the heading in the docs. Keys of dataset files,
network arguments and the fields of prompts are declared in the same way. `needs` are the conditions under which an
option has an effect: one that was given in vain is reported in one line, "`--huber_c` has no effect with
`--loss_type l2`".
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec

from hyimg.errors import first_few
from hyimg.report import Reporter


class Given:
    """At least one of `options` is given and not off; options that the command does not have do not count.

    `when` of any condition lists the values of the option itself that the condition is about (empty: all).
    """

    def __init__(self, *options: str, when: tuple[Any, ...] = ()) -> None:
        self.options, self.when = options, when

    def unmet(self, values: Mapping[str, Any]) -> str | None:
        available = [name for name in self.options if name in values]
        if not available or any(values[name] for name in available):
            return None
        return "without " + " or ".join(f"`--{name}`" for name in available)


class _OnValue:
    def __init__(self, option: str, *values: Any, when: tuple[Any, ...] = ()) -> None:
        self.option, self.values, self.when = option, values, when


class Unless(_OnValue):
    """`option` has none of `values`; without values: it is not given, or off."""

    def unmet(self, values: Mapping[str, Any]) -> str | None:
        value = values.get(self.option)
        if self.values:
            return f"with {as_typed(self.option, value)}" if _folded(value) in self.values else None
        return f"with `--{self.option}`" if value else None


class Only(_OnValue):
    """`option` has one of `values`."""

    def unmet(self, values: Mapping[str, Any]) -> str | None:
        if self.option not in values or (value := _folded(values[self.option])) in self.values:
            return None
        return (
            f"with {as_typed(self.option, value)}" if value else f"without `--{self.option} {self.values[0]}`"
        )


class Never:
    """The option never has an effect: it is accepted since other tools have it."""

    def __init__(self, reason: str, when: tuple[Any, ...] = ()) -> None:
        self.reason, self.when = reason, when

    def unmet(self, values: Mapping[str, Any]) -> str:
        return f": {self.reason}"


class Fact:
    """A condition that only a stage can judge, under `name` (`warn_of_idle`); `reason` is why there is no effect."""

    def __init__(self, name: str, reason: str, when: tuple[Any, ...] = ()) -> None:
        self.name, self.reason, self.when = name, reason, when


Condition = Given | Unless | Only | Never | Fact


def _folded(value: Any) -> Any:
    """Text in lower case, since names of plugins' functions are matched in any case."""
    return value.lower() if isinstance(value, str) else value


def as_typed(name: str, value: Any) -> str:
    """An option and its value as on a command line."""
    return f"`--{name}`" if value is True else f"`--{name} {value}`"


MAX_SEED = 2**64 - 1
"""The largest seed that torch's generators accept."""

REQUIRED: Any = MISSING
"""The default of an option that a command cannot run without."""

SAME: Any = object()
"""`reference_default` where the reference tool has the same default, or no such option."""

ABSENT: Any = object()
"""`reference_default` where the reference tool has no such option and behaves differently."""

ValueKind = Literal["bool", "int", "float", "str", "path", "table"]
_KINDS: Mapping[Any, ValueKind] = {
    **{bool: "bool", int: "int", float: "float", str: "str", Path: "path", Mapping: "table"},
}
_METAVARS = {"int": "INTEGER", "float": "NUMBER", "str": "TEXT", "path": "PATH"}


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """What a declaration adds to the field's name, type and default."""

    help: str
    aliases: tuple[str, ...] = ()
    """Other names, without dashes."""
    choices: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other spellings of a value."""
    minimum: float | None = None
    """The smallest value; of a text, the smallest number of characters."""
    maximum: float | None = None
    """The largest value; of a text, the largest number of characters."""
    above: float | None = None
    """A value must be larger than this."""
    below: float | None = None
    """A value must be smaller than this."""
    limits: str | None = None
    """Why the bounds are what they are, appended to an error about them."""
    multiple_of: int | None = None
    count: int | None = None
    """How many values a tuple takes."""
    convert: Callable[[Any], Any] | None = None
    """Reads a value instead of the conversion to the field's type; raises ValueError ("must be ...")."""
    text: Literal["any", "name", "path", "secret"] = "any"
    """What a text is: part of a file name, perhaps a path, or a secret, which is neither written nor shown."""
    argument: bool = False
    """Whether it is a positional argument."""
    refused: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    """Values that are not supported, with the reason."""
    sets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """What a value gives other options (None: their default), unless they are given next to it."""
    is_input: bool = False
    """Whether the path must exist."""
    pipeline_part: str | None = None
    """The folder to read where the root of a diffusers pipeline is given."""
    note: str | None = None
    """A note for whoever gives the flag."""
    imports: Literal["any", "dotted"] | None = None
    """Which of its values name code to import: any, or those with a dot (`package.Class`)."""
    needs: tuple[Condition, ...] = ()
    means_nothing: tuple[Any, ...] = ()
    """Values with which other tools' configurations say "not given"."""
    reference_default: Any = SAME
    """The reference tool's default where it differs, as its parser has it."""
    differs: str | None = None
    """Why it differs, for the docs."""


@dataclass(frozen=True, kw_only=True)
class Option(_Traits):
    """One declared option.

    `many`: it takes several values (a tuple). `optional`: None ("not given") is a legal value. `panel`: the heading
    that it is listed under.
    """

    name: str
    kind: ValueKind
    many: bool = False
    optional: bool = False
    required: bool = False
    default: Any = None
    panel: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases

    @property
    def metavar(self) -> str:
        return "|".join(self.choices) or _METAVARS.get(self.kind, "")

    @property
    def label(self) -> str:
        """The option as error messages name it."""
        return f"`{self.name.upper()}`" if self.argument else f"`--{self.name}`"


_KEY = "hyimg"
P = ParamSpec("P")


def _declaring(traits: Callable[P, _Traits]) -> Callable[Concatenate[Any, P], Any]:
    """The function that declares a field with such traits: its keywords are theirs."""

    def declare(default: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return dataclasses.field(default=default, metadata={_KEY: traits(*args, **kwargs)})

    return declare


option = _declaring(_Traits)
"""Declares an option: `option(DEFAULT, help=..., minimum=1)`; see `_Traits`.

The default holds where neither flag nor file gives a value; None means "not given".
"""


def required(group: type, name: str) -> Any:
    """Declares an option of another group again, as one that the command cannot run without."""
    (field,) = (field for field in dataclasses.fields(group) if field.name == name)
    return dataclasses.field(metadata=field.metadata)


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What the config of every command has in addition to its groups of options."""

    NEEDS: ClassVar[Mapping[str, tuple[Condition, ...]]] = {}
    """Further conditions, in this command only, for options of shared groups."""

    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)
    """The options that the user gave, whatever their value."""


@functools.cache
def options_of(group: type) -> tuple[Option, ...]:
    """The options that a group declares, in order; their panel is the first line of the group's docstring."""
    hints = typing.get_type_hints(group)
    panel = (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
    found = []
    for field in dataclasses.fields(group):
        if _KEY not in field.metadata:
            continue
        annotation = hints[field.name]
        members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
        (single,) = (member for member in members if member is not type(None))
        many = typing.get_origin(single) is tuple
        scalar = typing.get_args(single)[0] if many else typing.get_origin(single) or single
        is_required = field.default is MISSING
        found.append(
            Option(
                name=field.name,
                kind=_KINDS[scalar],
                many=many,
                optional=len(members) > 1,
                required=is_required,
                default=(() if many else None) if is_required else field.default,
                panel=panel,
                **vars(field.metadata[_KEY]),
            )
        )
    return tuple(found)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def groups_of(config: type) -> Mapping[str, type]:
    """The groups of a command's config, by the name of the field that holds each."""
    hints = typing.get_type_hints(config)
    names = (field.name for field in dataclasses.fields(config))
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


def all_options(config: type) -> Iterator[Option]:
    """Every option of a command, group by group."""
    for group in groups_of(config).values():
        yield from options_of(group)


def values_of(config: Any) -> dict[str, Any]:
    """The value of every option of a config by name, in order of declaration."""
    return {
        opt.name: getattr(getattr(config, field), opt.name)
        for field, group in groups_of(type(config)).items()
        for opt in options_of(group)
    }


def needs_of(config: type, opt: Option) -> tuple[Condition, ...]:
    """The conditions of an option in a command: those declared with it, and the command's own."""
    own: tuple[Condition, ...] = getattr(config, "NEEDS", {}).get(opt.name, ())
    return opt.needs + own


def unmet(conditions: Collection[Condition], value: Any, values: Mapping[str, Any]) -> str | None:
    """Why an option of that value has no effect with the other `values`, or None; facts are not considered."""
    for condition in conditions:
        if not isinstance(condition, Fact) and _applies(condition, value):
            reason = condition.unmet(values)
            if reason is not None:
                return reason
    return None


def _applies(condition: Condition, value: Any) -> bool:
    """Whether a condition is about this value of its option; a value that says "off" claims no effect."""
    off = value is None or value is False or value in ((), "")
    return not off and (not condition.when or value in condition.when)


def given_options(config: Any) -> frozenset[str]:
    """The options that a user gave; in a config made by a program, those that are not at their defaults."""
    if config.given:
        return frozenset(config.given)
    values = values_of(config)
    return frozenset(opt.name for opt in all_options(type(config)) if values[opt.name] != opt.default)


def idle_options(config: Any) -> dict[str, str]:
    """A sentence, by name, for each given option that has no effect with the values of the others."""
    values = values_of(config)
    given = given_options(config)
    sentences = {}
    for opt in all_options(type(config)):
        if opt.name in given:
            reason = unmet(needs_of(type(config), opt), values[opt.name], values)
            if reason is not None:
                space = "" if reason.startswith(":") else " "
                sentences[opt.name] = f"`--{opt.name}` has no effect{space}{reason}"
    return sentences


_FEW = 3


def idle_lines(config: Any) -> list[str]:
    """A line for each given option that has no effect with the values of the others; many at their defaults share one.

    A configuration that another program wrote has every option, most at defaults that nobody chose.
    """
    sentences = idle_options(config)
    values = values_of(config)
    defaults = {opt.name: opt.default for opt in all_options(type(config))}
    at_default = [name for name in sentences if values[name] == defaults[name]]
    if len(at_default) <= _FEW:
        return list(sentences.values())
    listed = first_few([f"`--{name}`" for name in at_default])
    return [
        *(sentence for name, sentence in sentences.items() if name not in at_default),
        f"{len(at_default)} options at their defaults have no effect in this run: {listed}",
    ]


def warn_of_idle(config: Any, report: Reporter, **facts: bool | Collection[str]) -> None:
    """Warns of each given option that has no effect because one of `facts` is false.

    A fact that differs from option to option is the collection of the names that it is true of.
    """
    values = values_of(config)
    given = given_options(config)
    for opt in all_options(type(config)):
        needs = needs_of(type(config), opt)
        if opt.name not in given or unmet(needs, values[opt.name], values) is not None:
            continue
        for condition in needs:
            if (
                isinstance(condition, Fact)
                and _applies(condition, values[opt.name])
                and condition.name in facts
            ):
                holds = facts[condition.name]
                if not (holds if isinstance(holds, bool) else opt.name in holds):
                    report.warning(f"`--{opt.name}` has no effect: {condition.reason}")
                    break
