"""One value: from text or TOML to the type and within the bounds that its option declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyimg.config.names import plain_name_problem, printable
from hyimg.config.option import Option
from hyimg.errors import did_you_mean

# Counts and sizes beyond it are slips of the hand, and torch takes none
_LARGEST_INT = 2**64 - 1

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def checked(opt: Option, raw: Any, place: str, problems: list[str]) -> Any:
    """The value of an option in its declared type, or the default after noting what is wrong.

    `raw` is text from the command line or a value from TOML, `place` names the file that it stands in.
    """
    try:
        if opt.many:
            items = raw if isinstance(raw, (list, tuple)) else [raw]
            if opt.traits.count is not None and items and len(items) % opt.traits.count == 0:
                items = items[-opt.traits.count :]  # of a repeated flag the last counts
            if opt.traits.count is not None and len(items) != opt.traits.count:
                raise ValueError(f"takes {opt.traits.count} values, got {len(items)}: {opt.traits.help}")
            value: Any = tuple(_scalar(opt, item) for item in items)
        elif isinstance(raw, (list, tuple)):
            raise ValueError(f"takes one value, got {len(raw)}")
        else:
            value = _scalar(opt, raw)
    except ValueError as error:
        problems.append(f"{opt.label}{place} {error}")
        return opt.default
    if not opt.many and value in opt.traits.refused:
        problems.append(f"{opt.label}{place} cannot be `{_written(value)}`: {opt.traits.refused[value]}")
    return value


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scalar(opt: Option, raw: Any) -> Any:
    value = _convert(opt, raw)
    _check_bounds(opt, value)
    return value


def _convert(opt: Option, raw: Any) -> Any:
    if opt.kind == "bool":
        if isinstance(raw, bool):
            return raw
        word = str(raw).lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(f"must be true or false, got `{raw}`")
        return word in _TRUE
    if isinstance(raw, bool):
        raise ValueError(f"must be {_article(opt)}, got `{str(raw).lower()}`")
    if opt.kind == "int":
        try:
            # 1e4 and 100.0 are whole numbers too, as the reference tool's users write them
            number = float(raw) if isinstance(raw, float) or "e" in str(raw).lower() else int(raw)
            if number != int(number):
                raise ValueError
            return int(number)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"must be a whole number, got `{raw}`") from None
    if opt.kind == "float" and opt.traits.steps_or_share:
        return _steps_or_share(raw)
    if opt.kind == "float":
        try:
            number = float(raw)
        except (ValueError, TypeError):
            raise ValueError(f"must be a number, got `{raw}`") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(f"must be a finite number, got `{raw}`")
        return number
    if opt.kind == "path":
        if not str(raw):
            raise ValueError("must be a path, got nothing")
        return _path(_encodable(str(raw)))
    if not isinstance(raw, str):
        raise ValueError(f"must be text, got `{raw}`")
    _encodable(raw)
    return opt.traits.synonyms.get(raw, raw)


def _steps_or_share(raw: Any) -> float:
    """A whole number of steps, or a share of them below 1, which `5%` is too."""
    text = str(raw).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"must be a number of steps or a share below 1, got `{raw}`") from None
    if number != number or (number >= 1 and (text.endswith("%") or not number.is_integer())):
        raise ValueError(f"must be a whole number of steps or a share below 1, got `{raw}`")
    return number


def _encodable(text: str) -> str:
    """The text, which must be UTF-8: it goes into run files, metadata and indexes as such."""
    if printable(text) != text:
        raise ValueError(f"must be UTF-8 text, got `{printable(text)}`")
    return text


def _path(text: str) -> Path:
    if "\0" in text:
        raise ValueError("must be a path, got one with a zero byte")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"must be a path, got `{text}`, whose user is not known here") from None


def _article(opt: Option) -> str:
    return {
        "int": "a whole number",
        "float": "a number",
        "path": "a path",
        "str": "text",
        "bool": "true or false",
    }[opt.kind]


def _check_bounds(opt: Option, value: Any) -> None:
    traits = opt.traits
    if traits.choices and value not in traits.choices:
        hint = did_you_mean(str(value), traits.choices)
        raise ValueError(
            f"must be one of {', '.join(f'`{c}`' for c in traits.choices)}, got `{value}`"
            + (f"; {hint}" if hint else "")
        )
    if traits.minimum is not None and (
        value < traits.minimum or (traits.exclusive_minimum and value == traits.minimum)
    ):
        raise ValueError(
            f"must be {'above' if traits.exclusive_minimum else 'at least'} {_shown(traits.minimum)}, "
            f"got {_shown(value)}"
        )
    maximum = traits.maximum if traits.maximum is not None or opt.kind != "int" else _LARGEST_INT
    if maximum is not None and value > maximum:
        reason = f": {traits.bound_reason}" if traits.bound_reason else ""
        raise ValueError(f"must be at most {_shown(maximum)}, got {_shown(value)}{reason}")
    if traits.is_name and value != opt.default and (problem := plain_name_problem(value)) is not None:
        raise ValueError(f"must be a plain name, got `{value}`: {problem}")
    if traits.multiple_of is not None and value % traits.multiple_of:
        lower = value - value % traits.multiple_of
        around = f"{lower} or {lower + traits.multiple_of}" if lower else f"{traits.multiple_of}"
        raise ValueError(f"must be a multiple of {traits.multiple_of}, got {value} (nearest: {around})")


def _shown(number: float) -> str:
    """A bound or a value in full where it is whole and not endless."""
    text = str(number) if isinstance(number, int) else f"{number:g}"
    return text if len(text) <= 24 else f"a number of {len(text)} digits"
