"""Arguments given as `"name=value"` (`--loss_args "gain=3"`, `--network_args "dora=True"`), checked before any work.

Those of a function are checked by its signature, those of a group of declared options by their declarations. Values
are checked, and errors worded, by `hyimg.config.values`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from types import NoneType
from typing import Any, TypeVar, cast

from hyimg.config.option import ValueKind, options_of
from hyimg.config.values import KIND_NAMES, check_value, convert
from hyimg.errors import HyimgError, did_you_mean

G = TypeVar("G")
_KINDS: Mapping[object, ValueKind] = {bool: "bool", int: "int", float: "float", str: "str"}


def parse_arguments(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """`"name=value"` texts as a dictionary; values are Python literals where they can be read as such.

    `true`, `false` and `none` count as literals in any case. Raises HyimgError as `read_pairs`.
    """
    return {name: _literal(text) for name, text in read_pairs(pairs, option).items()}


def parse_options(
    group: type[G],
    pairs: Iterable[str],
    option: str,
    *,
    also: Collection[str] = (),
    unsupported: Mapping[str, str] | None = None,
) -> G:
    """`"name=value"` texts as a group of declared options; `none` is the default.

    `also` are names that somebody else reads, for the hint; `unsupported` maps names to why they are not supported.
    Raises HyimgError as `read_pairs`, and for an unknown or unsupported name and a wrong value.
    """
    known = {opt.name: opt for opt in options_of(cast(type, group))}
    values = {}
    for name, text in read_pairs(pairs, option).items():
        if name in (unsupported or {}):
            raise HyimgError(f"`{name}` in `{option}` is not supported: {(unsupported or {})[name]}")
        if name not in known:
            raise _unknown(name, f"unknown argument `{name}` in `{option}`", [*also, *known])
        try:
            if text.lower() != "none":
                values[name] = check_value(known[name], text)
        except ValueError as error:
            raise HyimgError(f"`{name}` in `{option}` {error}") from None
    return group(**values)


def _unknown(name: str, message: str, known: Collection[str]) -> HyimgError:
    listed = ", ".join(f"`{one}`" for one in known) or "none"
    return HyimgError(message, hint=did_you_mean(name, known) or f"known arguments: {listed}")


def read_pairs(pairs: Iterable[str], option: str) -> dict[str, str]:
    """`"name=value"` texts as names and the texts of their values.

    Raises HyimgError, with the corrected text, for one without `=`, several arguments in one text, commas between
    arguments, spaces between numbers, and a name that is given twice. A value that holds pairs itself
    (`network_reg_dims=a=4,b=8`) is left to its reader.
    """
    texts = [pair.strip() for pair in pairs]
    result: dict[str, str] = {}
    for place, pair in enumerate(texts):
        name, equals, text = (part.strip() for part in pair.partition("="))
        following = texts[place + 1] if place + 1 < len(texts) else ""
        if not equals or not name:
            raise HyimgError(
                f"`{option}` takes `name=value`, got `{pair}`", hint=_with_equals(pair, texts[:place], option)
            )
        _check_separators(pair, name, text, following, option)
        if name in result:
            joined = f"join the two by a comma: `{name}={result[name]},{text}`" if "=" in text else None
            raise HyimgError(f"`{option}` gives `{name}` twice", hint=joined or "keep one of the two")
        result[name] = text
    return result


# Where a second argument begins in the text of one
_NEXT_ARGUMENT = re.compile(r"(?<![\s,;])[\s,;]+(?=[A-Za-z_]\w*\s*=)")


def _check_separators(pair: str, name: str, text: str, following: str, option: str) -> None:
    """Raises HyimgError where a text holds more, or less, than one value."""
    first, *others = _NEXT_ARGUMENT.split(text)
    if others and "=" not in first and isinstance(_literal(text), str) and not _is_quoted(text):
        split = " ".join(f'"{part.strip(" ,;")}"' for part in _NEXT_ARGUMENT.split(pair))
        raise HyimgError(
            f"`{option}` got several arguments in one text: `{pair}`",
            hint=f"write them separately, without commas between them: `{option} {split}`",
        )
    if name.startswith((",", ";")) or (text.endswith((",", ";")) and "=" not in text):
        bare_name, value = name.lstrip(" ,;"), text.rstrip(" ,;")
        if _are_numbers(following):  # `betas=0.9, 0.99` without quotes
            value = f"{value},{following.strip(' ,;')}"
        raise HyimgError(
            f"`{option}`: stray comma in `{pair}`",
            hint=f"arguments are separated by spaces, not by commas: `{bare_name}={value}`",
        )
    numbers = re.split(r"[\s,;]+", text)
    if len(numbers) > 1 and isinstance(_literal(text), str) and all(map(_are_numbers, numbers)):
        raise HyimgError(
            f"`{option}`: the numbers of `{name}` are not separated by commas in `{pair}`",
            hint=f"write `{name}={','.join(numbers)}`",
        )


def _with_equals(pair: str, before: Sequence[str], option: str) -> str:
    """What a text without `name=` probably means."""
    if before and _are_numbers(pair):
        return f"the numbers of one argument are separated by commas, without spaces: `{before[-1]},{pair}`"
    written = re.fullmatch(r"([A-Za-z_]\w*)(?:\s*:\s*|\s+)(\S+)", pair)
    if written is not None:
        return f"write `{written[1]}={written[2]}`"
    return f'arguments are separated by spaces: `{option} "name=value" "name=value"`'


def _are_numbers(text: str) -> bool:
    """Whether a text is one number, or several with commas between them."""
    parts = [part for part in text.split(",") if part.strip()]
    with suppress(ValueError):
        return bool(text.strip(" ,;")) and all(float(part) is not None for part in parts)
    return False


def _is_quoted(text: str) -> bool:
    return text[:1] in ("'", '"') and text[-1:] == text[:1]


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def arguments_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that `name=value` may set: arguments that are keyword-only or have a default."""
    return tuple(_settable(function))


def check_names(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, option: str, name: str
) -> None:
    """Raises HyimgError for an argument that the function does not take as a keyword."""
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return
    takes = arguments_of(function)
    for argument in arguments:
        if argument not in takes:
            raise _unknown(argument, f"unknown argument `{argument}` of `{name}` in `{option}`", takes)


def check_kinds(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, option: str, name: str
) -> None:
    """Raises HyimgError for a value of another kind than the argument's default.

    For classes of other packages, whose annotations are not reliable. Checked are switches, numbers, and tuples of
    numbers, whose length must fit where it is known. None passes, and so does a list in place of a number, which
    schedules take as a number for each group.
    """
    for parameter in _settable(function).values():
        value, default = arguments.get(parameter.name), parameter.default
        if value is None:
            continue
        if isinstance(default, bool):
            fits, wanted = isinstance(value, (bool, int)), KIND_NAMES["bool"]
        elif isinstance(default, (int, float)):
            is_switch = isinstance(value, bool) and isinstance(default, float)
            fits, wanted = isinstance(value, (int, float, list)) and not is_switch, KIND_NAMES["float"]
        elif _is_numbers(default):
            counts = _counts(function, parameter)
            fits = _is_numbers(value) and (not counts or len(value) in counts)
            wanted = f"numbers like `{','.join(map(str, default))}`"
        else:
            continue
        if not fits:
            raise _wrong(parameter.name, name, option, wanted, value)


def _wrong(
    argument: str, name: str, option: str, wanted: str, value: Any, hint: str | None = None
) -> HyimgError:
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return HyimgError(f"`{argument}` of `{name}` in `{option}` must be {wanted}, got `{shown}`", hint=hint)


def _is_numbers(value: object) -> bool:
    return (
        isinstance(value, (tuple, list))
        and bool(value)
        and all(isinstance(item, (int, float)) for item in value)
    )


def _counts(function: Callable[..., Any], parameter: inspect.Parameter) -> set[int]:
    """How many numbers an argument may have, by its annotation, else by its default; empty where that is open."""
    if parameter.annotation is parameter.empty:
        return {len(parameter.default)}
    members = _members(_evaluated(function, parameter.annotation))
    if not all(typing.get_origin(member) is tuple for member in members):
        return set()
    arguments = [typing.get_args(member) for member in members]
    return set() if any(Ellipsis in of for of in arguments) else {len(of) for of in arguments}


def bind_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    option: str,
    name: str,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """`arguments` as the function takes them, by its signature.

    Checked are annotations of bool, int, float, str, None, Literal or a union of these; a whole number becomes a float
    where one is expected. `given` are keywords that the caller passes himself. Raises HyimgError for an unknown
    argument, a value of another type, and a missing one.
    """
    check_names(function, arguments, option=option, name=name)
    settable = _settable(function)
    bound = dict(arguments)
    for argument in arguments:
        if argument in settable:
            allowed = _allowed(function, settable[argument].annotation)
            if allowed is not None:
                bound[argument] = _fitted(arguments[argument], allowed, argument, name, option)
    for parameter in settable.values():
        if parameter.default is parameter.empty and parameter.name not in {*bound, *given}:
            raise HyimgError(
                f"`{option}`: `{name}` needs the argument `{parameter.name}`",
                hint=f'give `{option} "{parameter.name}=VALUE"`',
            )
    return bound


def _settable(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        p.name: p
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY or (p.default is not p.empty and p.kind is not p.POSITIONAL_ONLY)
    }


def _allowed(function: Callable[..., Any], annotation: Any) -> tuple[Any, ...] | None:
    """The scalar types and the literal values that an annotation allows; None where it is about anything else."""
    allowed: list[Any] = []
    for member in _members(_evaluated(function, annotation)):
        if typing.get_origin(member) is typing.Literal:
            allowed += typing.get_args(member)
        elif member in _KINDS or member in (None, NoneType):
            allowed.append(NoneType if member is None else member)
        else:
            return None
    return tuple(allowed)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _evaluated(function: Callable[..., Any], annotation: Any) -> Any:
    """An annotation as an object; it stays text where only type checkers know its names (TYPE_CHECKING)."""
    if not isinstance(annotation, str):
        return annotation
    names = vars(sys.modules.get(function.__module__, typing))
    try:
        return eval(annotation, dict(names))
    except Exception:
        return annotation


def _fitted(value: Any, allowed: tuple[Any, ...], argument: str, name: str, option: str) -> Any:
    """The value as one of the allowed types; raises HyimgError."""
    literals = [one for one in allowed if not isinstance(one, type)]
    if (value is None and NoneType in allowed) or any(
        type(one) is type(value) and one == value for one in literals
    ):
        return value
    kinds = [_KINDS[one] for one in allowed if one in _KINDS]
    for kind in kinds:
        with suppress(ValueError):
            return convert(kind, value, typed=True)
    words = (
        [KIND_NAMES[kind] for kind in kinds]
        + [f"`{one}`" for one in literals]
        + ["none"] * (NoneType in allowed)
    )
    hint = f"quote a text that looks like a number: `{argument}='{value}'`" if "str" in kinds else None
    raise _wrong(argument, name, option, " or ".join(words), value, hint)
