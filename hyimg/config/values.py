"""The one checker of values: of flags, run files, dataset files, network arguments, prompts and plugins' arguments.

    check_value(opt, "1e4")    # 10000
    check_value(opt, "1.5")    # ValueError: must be a whole number, got `1.5`

`opt` is the value's declaration (`hyimg.config.option`). The caller puts the name and the place before the sentence.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from hyimg.config.documents import control_character_problem, is_encodable
from hyimg.config.option import Option, ValueKind
from hyimg.errors import HyimgError, did_you_mean

KIND_NAMES: dict[ValueKind, str] = {
    "int": "a whole number",
    "float": "a number",
    "path": "a path",
    "str": "text",
    "bool": "true or false",
    "table": "a table",
}

# Larger counts and sizes are typing errors, and torch accepts none
_LARGEST_INT = 2**64 - 1
_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_MAX_PATH_PARTS = 255
_SHOWN_CHARS = 200


def check_value(opt: Option, raw: Any, *, typed: bool = False) -> Any:
    """The value in the type and within the bounds that its option declares.

    `raw` is text from a command line, or a value of TOML, JSON or Python; with `typed`, text is not read as a number or
    a switch. A value that the option refuses (`Option.refused`) is returned like any other.

    Raises:
        ValueError: a sentence without its subject, such as "must be at least 1, got 0".
    """
    if not opt.many or opt.convert is not None:
        return _check_one(opt, raw, typed)
    items = list(raw) if isinstance(raw, (list, tuple)) else [raw]
    if not typed and opt.kind == "int" and opt.count is None:  # `500,800` as well as `500 800`
        items = [part for item in items for part in (str(item).replace(",", " ").split() or [item])]
    if not typed and opt.count is not None and items and len(items) % opt.count == 0:
        items = items[-opt.count :]  # of a repeated flag, the last counts
    if opt.count is not None and len(items) != opt.count:
        raise ValueError(f"takes {opt.count} values, got {len(items)}: {opt.help}")
    return tuple(_check_one(opt, item, typed) for item in items)


def _check_one(opt: Option, raw: Any, typed: bool) -> Any:
    if opt.convert is not None:
        value = opt.convert(raw)
    elif isinstance(raw, (list, tuple)) and not typed:
        raise ValueError(f"takes one value, got {len(raw)}")
    else:
        value = convert(opt.kind, raw, typed=typed)
    if opt.kind == "str":
        value = opt.synonyms.get(value, value)
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        _check_bounds(opt, value)
    return value


def convert(kind: ValueKind, raw: Any, *, typed: bool = False) -> Any:
    """The value as one of that kind; raises ValueError as `check_value`."""
    value: Any = None
    if kind == "bool":
        value = raw if isinstance(raw, bool) else None if typed else _WORDS.get(str(raw).lower())
    elif kind in ("int", "float"):
        value = _number(kind, raw, typed)
    elif kind == "table":
        value = raw if isinstance(raw, dict) else None
    elif isinstance(raw, str) or (kind == "path" and not typed and not isinstance(raw, bool)):
        if not is_encodable(str(raw)):  # it goes into run files, metadata and indexes
            raise ValueError(f"must be UTF-8 text, got `{raw}`")
        value = raw if kind == "str" else _path(str(raw))
    if value is None:
        raise ValueError(f"must be {KIND_NAMES[kind]}, got {shown_value(raw, typed=typed)}")
    return value


def _number(kind: ValueKind, raw: Any, typed: bool) -> float | None:
    """A whole number or a finite one, or None. `1e4` and `100.0` are whole numbers too, as other tools write them."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float) if typed else (int, float, str)):
        return None
    try:
        if kind == "int" and not isinstance(raw, float) and "e" not in str(raw).lower():
            return int(raw)
        number = float(raw)
    except ValueError:
        return None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        if kind == "float":
            raise ValueError(f"must be a finite number, got {shown_value(raw, typed=typed)}")
        return None
    if kind == "float":
        return number
    return int(number) if number.is_integer() and not typed else None


def _path(text: str) -> Path | None:
    if not text:
        return None
    if "\0" in text:
        raise ValueError("must be a path, got one with a zero byte")
    if (problem := control_character_problem(text)) is not None:
        raise ValueError(problem)
    if len(Path(text).parts) > _MAX_PATH_PARTS:  # each level is a call where folders are made
        raise ValueError(f"must be a path of at most {_MAX_PATH_PARTS} levels, got `{text}`")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"must be a path, got `{text}`, whose user does not exist here") from None


def _check_bounds(opt: Option, value: Any) -> None:
    if opt.choices and value not in opt.choices and value not in opt.refused:
        hint = did_you_mean(str(value), opt.choices)
        listed = ", ".join(f"`{choice}`" for choice in opt.choices)
        raise ValueError(f"must be one of {listed}, got `{value}`" + (f"; {hint}" if hint else ""))
    if opt.text == "name" and value != opt.default and (problem := plain_name_problem(value)) is not None:
        raise ValueError(f"must be a plain name, got `{value}`: {problem}")
    size, unit = (len(value), " characters") if isinstance(value, str) else (value, "")
    maximum = _LARGEST_INT if opt.maximum is None and opt.kind == "int" else opt.maximum
    bound = None
    if value == "" and opt.minimum is not None:
        raise ValueError("must not be empty")
    if opt.minimum is not None and size < opt.minimum:
        bound = f"at least {_digits(opt.minimum)}{unit}"
    elif opt.above is not None and size <= opt.above:
        bound = f"above {_digits(opt.above)}"
    elif maximum is not None and size > maximum:
        bound = f"at most {_digits(maximum)}{unit}"
    elif opt.below is not None and size >= opt.below:
        bound = f"below {_digits(opt.below)}"
    elif opt.multiple_of is not None and value % opt.multiple_of:
        lower = value - value % opt.multiple_of
        near = f"{lower} or {lower + opt.multiple_of}" if lower else f"{opt.multiple_of}"
        raise ValueError(f"must be a multiple of {opt.multiple_of}, got {value} (nearest: {near})")
    if bound is not None:
        reason = f": {opt.limits}" if opt.limits else ""
        raise ValueError(f"must be {bound}, got {_digits(size)}{reason}")


def steps_or_share(raw: Any) -> float:
    """A whole number of steps, or a share of the run below 1, which `5%` is too; raises ValueError."""
    text = str(raw).strip()
    is_percent = text.endswith("%")
    try:
        number = float(text.removesuffix("%")) / (100 if is_percent else 1)
    except ValueError:
        number = math.nan
    if (
        isinstance(raw, bool)
        or math.isnan(number)
        or (number >= 1 and (is_percent or not number.is_integer()))
    ):
        raise ValueError(f"must be a whole number of steps or a share below 1, got `{raw}`")
    return number


def shown_value(raw: Any, *, typed: bool = True) -> str:
    """A value as written in a file, shortened if it is long; text from a command line without quotes."""
    if raw == "" and not typed:
        return "nothing"
    if isinstance(raw, str) and not typed:
        return f"`{raw}`"
    if isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) >= 10**24:
        return _digits(raw)
    text = json.dumps(raw, default=str, ensure_ascii=False)
    return f"`{text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + '...'}`"


def _digits(number: float) -> str:
    """A number in full, or the number of its digits."""
    if isinstance(number, int) and abs(number) >= 10**24:
        return f"a number of {len(str(abs(number)))} digits"
    return str(number) if isinstance(number, int) else f"{number:g}"


MAX_NAME_BYTES = 200
"""Leaves room, within the 255 bytes of common file systems, for `-step00000100.safetensors` and the like."""

_FORBIDDEN = frozenset('<>:"|?*/\\')
# Windows gives these to devices, with any ending
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def plain_name_problem(name: str) -> str | None:
    """Why a name cannot be part of a file name on every system, or None where it can."""
    if not name.strip():
        return "it is empty"
    if found := sorted(_FORBIDDEN & set(name)):
        return f"it holds {' '.join(f'`{char}`' for char in found)}"
    if any(ord(char) < 32 for char in name):
        return "it holds a control character"
    if set(name) == {"."}:
        return "it is the name of a folder"
    if name[-1] in ". ":
        return "it ends with a dot or a space, which Windows removes"
    if _DEVICE.fullmatch(name):
        return "it is the name of a device on Windows"
    # bytes are what a file system counts
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    return None


def check_plain_name(name: str, option: str, *, hint: str | None = None) -> None:
    """Raises HyimgError where `name`, given with `option` (say `--output_name`), is not a plain name."""
    if (problem := plain_name_problem(name)) is not None:
        raise HyimgError(f"`{option}` `{name}` must be a plain name: {problem}", hint=hint)
