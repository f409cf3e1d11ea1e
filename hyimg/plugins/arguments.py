"""What the command line gives to a plugin's function (`--loss_args "gain=3"`), checked before any work."""

from __future__ import annotations

import ast
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from hyimg.errors import HyimgError, did_you_mean

_SCALARS = (bool, int, float, str, type(None))
_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "none",
}


def parse_arguments(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """`"name=value"` texts as a dictionary; values are Python literals where they can be read as such.

    `true`, `false` and `none` count as literals in any case. Raises HyimgError for a text without `=`.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise HyimgError(f"`{option}` takes `name=value`, got `{pair}`")
        result[name.strip()] = _literal(text.strip())
    return result


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def arguments_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that `name=value` may set: keyword arguments, those that stand alone and those with a default."""
    return tuple(_settable(function))


def check_names(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, option: str, name: str
) -> None:
    """Raises HyimgError for an argument that the function does not take as a keyword, naming those it does."""
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return
    takes = arguments_of(function)
    for argument in arguments:
        if argument not in takes:
            known = ", ".join(f"`{t}`" for t in takes) or "none"
            raise HyimgError(
                f"`{option}`: `{name}` takes no argument `{argument}`",
                hint=did_you_mean(argument, takes) or f"its arguments: {known}",
            )


def bind_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    option: str,
    name: str,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """`arguments` as the function takes them, by its signature.

    An annotation of bool, int, float, str, None, Literal or a union of these is held to; other arguments pass
    as they are. A whole number becomes a float where one is asked for. `given` are keywords that the caller
    gives himself. Raises HyimgError for an unknown argument, a value of another type, and a missing one.
    """
    check_names(function, arguments, option=option, name=name)
    settable = _settable(function)
    bound = {}
    for argument, value in arguments.items():
        parameter = settable.get(argument)
        types_ = None if parameter is None else _allowed(function, parameter.annotation)
        bound[argument] = (
            value if types_ is None else _fitted(value, types_, f"`{option}`: `{name}`", argument)
        )
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
    if isinstance(annotation, str):
        # an annotation for type checkers alone (names under TYPE_CHECKING) cannot be evaluated
        names = vars(sys.modules.get(function.__module__, typing))
        try:
            annotation = eval(annotation, dict(names))
        except Exception:
            return None
    if annotation is None:
        return (type(None),)
    if annotation in _SCALARS:
        return (annotation,)
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [_allowed(function, member) for member in typing.get_args(annotation)]
        return None if None in members else tuple(one for some in members for one in some or ())
    return None


def _fitted(value: Any, allowed: tuple[Any, ...], blame: str, argument: str) -> Any:
    """The value where it is allowed, a whole number as a float where that is."""
    if type(value) in allowed or any(type(one) is type(value) and one == value for one in allowed):
        return value
    if type(value) is int and float in allowed:
        return float(value)
    words = [_TYPE_NAMES[one] if isinstance(one, type) else f"`{one}`" for one in allowed]
    quoted = str in allowed
    raise HyimgError(
        f"{blame} takes {' or '.join(words)} for `{argument}`, got `{value}`",
        hint=f"quote a text that looks like a number: `{argument}='{value}'`" if quoted else None,
    )
