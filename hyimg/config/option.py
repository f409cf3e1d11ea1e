"""How an option is declared: a dataclass field that carries its help, bounds and other names.

    @dataclass(frozen=True, kw_only=True)
    class Network:
        network_dim: int = option(4, help="rank of the adapters", minimum=1)

The field's name is the flag (`--network_dim`, dashes too), the TOML key and the heading in the docs.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_METADATA_KEY = "hyimg"

MAX_SEED = 2**64 - 1
"""What torch's generators take."""

Kind = Literal["bool", "int", "float", "str", "path"]
_KINDS: Mapping[type, Kind] = {bool: "bool", int: "int", float: "float", str: "str", Path: "path"}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a field says of itself beyond its type and default."""

    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    multiple_of: int | None = None
    count: int | None = None
    steps_or_share: bool = False
    argument: bool = False
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    is_input: bool = False
    is_name: bool = False
    pipeline_part: str | None = None
    bound_reason: str | None = None
    note: str | None = None
    is_secret: bool = False


@dataclass(frozen=True, kw_only=True)
class Option:
    """One declared option, ready for the flag maker, the loader and the docs.

    `name` is the field, flag and TOML key; `kind` its scalar type; `many` says that it takes several values
    (a tuple); `optional` that None ("not given") is a legal value; `panel` the heading it is listed under.
    """

    name: str
    kind: Kind
    many: bool
    optional: bool
    default: Any
    panel: str
    traits: Traits

    @property
    def metavar(self) -> str:
        if self.traits.choices:
            return "|".join(self.traits.choices)
        return {"bool": "", "int": "INTEGER", "float": "NUMBER", "str": "TEXT", "path": "PATH"}[self.kind]

    @property
    def label(self) -> str:
        """The option as error messages name it."""
        return f"`{self.name.upper()}`" if self.traits.argument else f"`--{self.name}`"


def option(
    default: Any,
    *,
    help: str,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: bool = False,
    multiple_of: int | None = None,
    count: int | None = None,
    steps_or_share: bool = False,
    argument: bool = False,
    synonyms: Mapping[str, str] | None = None,
    refused: Mapping[Any, str] | None = None,
    is_input: bool = False,
    is_name: bool = False,
    pipeline_part: str | None = None,
    bound_reason: str | None = None,
    note: str | None = None,
    is_secret: bool = False,
) -> Any:
    """Declares an option inside a group.

    `default` is the value where neither flag nor file gives one; None means "not given" (whether a command
    cannot do without is said in `commands.py`). `aliases` are further names without dashes. Bounds are
    inclusive unless `exclusive_minimum`. `count` fixes how many values a tuple takes. `steps_or_share` is a number of
    steps, or below 1 (or with a `%`) a share of them. `argument` makes it a
    positional argument. `synonyms` maps other spellings of a value to the one that is kept. `refused` maps
    values that never will be to the reason. `is_input` says that the path must be there to be read, `is_name`
    that the text becomes part of a file's name (`hyimg.config.names`). `pipeline_part` is the folder of a diffusers
    pipeline that is taken where its root is given. `bound_reason` says why there is a
    maximum, and `note` is told to whoever types the flag. `is_secret` keeps the value out of everything that a
    command writes or says (`hyimg.config.load.flatten`).
    """
    traits = Traits(
        help=help,
        aliases=aliases,
        choices=choices,
        minimum=minimum,
        maximum=maximum,
        exclusive_minimum=exclusive_minimum,
        multiple_of=multiple_of,
        count=count,
        steps_or_share=steps_or_share,
        argument=argument,
        synonyms=synonyms or {},
        refused=refused or {},
        is_input=is_input,
        is_name=is_name,
        pipeline_part=pipeline_part,
        bound_reason=bound_reason,
        note=note,
        is_secret=is_secret,
    )
    return dataclasses.field(default=default, metadata={_METADATA_KEY: traits})


def _parse_type(annotation: Any) -> tuple[Kind, bool, bool]:
    """(scalar kind, takes several values, may be None) of a field's annotation."""
    optional = False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        assert len(members) == 1, f"an option has one type, not {annotation}"
        annotation, optional = members[0], True
    many = typing.get_origin(annotation) is tuple
    if many:
        annotation = typing.get_args(annotation)[0]
    return _KINDS[annotation], many, optional


@functools.cache
def options_of(group: type) -> tuple[Option, ...]:
    """The options that a group declares, in order; the panel is the first line of the group's docstring."""
    hints = typing.get_type_hints(group)
    panel = (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
    found = []
    for field in dataclasses.fields(group):
        kind, many, optional = _parse_type(hints[field.name])
        found.append(
            Option(
                name=field.name,
                kind=kind,
                many=many,
                optional=optional,
                default=field.default,
                panel=panel,
                traits=field.metadata[_METADATA_KEY],
            )
        )
    return tuple(found)


def groups_of(config: type) -> dict[str, type]:
    """The groups of a command's config, by the name of the field that holds each."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def all_options(config: type) -> Iterator[Option]:
    """Every option of a command, group by group."""
    for group in groups_of(config).values():
        yield from options_of(group)
