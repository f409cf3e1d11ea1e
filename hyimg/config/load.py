"""From flags and a TOML run file to a command's frozen config.

Flags win over the file, the file over the defaults. Everything wrong is found in one pass and raised as one
error, so that a user mends a command line once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli

from hyimg.config import legacy
from hyimg.config.option import Option, all_options, groups_of, options_of
from hyimg.errors import HyimgError, did_you_mean

C = TypeVar("C")

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def read_run_file(path: Path) -> dict[str, Any]:
    """The keys of a TOML run file, tables flattened (a table is only a heading).

    Raises HyimgError where the file is missing, is no TOML, or says one key twice.
    """
    try:
        document = tomli.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise HyimgError(
            f"cannot read the run file `{path}`: {error.strerror}",
            hint="give `--config` an existing TOML file",
        ) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HyimgError(f"the run file `{path}` is not valid TOML: {error}") from error
    keys: dict[str, Any] = {}
    _flatten(document, keys, path)
    return keys


def _flatten(table: Mapping[str, Any], into: dict[str, Any], path: Path) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            _flatten(value, into, path)
        elif key.replace("-", "_") in into:
            raise HyimgError(f"the run file `{path}` gives `{key}` twice", hint="keep one of the two")
        else:
            into[key.replace("-", "_")] = value


def make(
    config: type[C],
    given: Mapping[str, Any],
    *,
    run_file: Path | None = None,
    notes: list[str] | None = None,
) -> C:
    """The config of type `config` from what was given, checked.

    `given` maps option names (or aliases) to values as typed (text) or as Python values; a key with value
    None counts as not given. What the run file says is overridden by `given`. Notes about options that have
    no effect are appended to `notes`. Raises one HyimgError that lists every problem.
    """
    by_name = _names(config)
    problems: list[str] = []
    values: dict[str, tuple[Any, str]] = {}
    if run_file is not None:
        notes = notes if notes is not None else []
        from_file = legacy.translate_mapping(read_run_file(run_file), frozenset(by_name), problems, notes)
        _collect(from_file, by_name, f" in `{run_file}`", values, problems)
    _collect(given, by_name, "", values, problems)

    resolved: dict[str, Any] = {}
    for opt in all_options(config):
        if opt.name in values:
            raw, place = values[opt.name]
            resolved[opt.name] = _checked(opt, raw, place, problems)
        else:
            resolved[opt.name] = opt.default
    required = getattr(config, "REQUIRED", ())
    problems += [f"{by_name[name].label} is required" for name in required if resolved[name] in (None, ())]
    if problems:
        raise _all_problems(problems)
    return _assemble(config, resolved)


def replace(config: C, **changes: Any) -> C:
    """A copy of a config with some options changed, checked like typed ones."""
    values = {**flatten(config), **changes}
    return make(type(config), {k: v for k, v in values.items() if v is not None})


def flatten(config: Any) -> dict[str, Any]:
    """All options of a config by name, in order of declaration."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        values.update({f.name: getattr(group, f.name) for f in dataclasses.fields(group)})
    return values


def check_inputs(config: Any) -> None:
    """Raises one HyimgError that names every option whose file or folder is not there."""
    values = flatten(config)
    missing = []
    for opt in all_options(type(config)):
        if opt.traits.is_input and values[opt.name] is not None:
            paths = values[opt.name] if opt.many else (values[opt.name],)
            missing += [f"{opt.label}: there is no file `{path}`" for path in paths if not path.exists()]
    if missing:
        raise _all_problems(missing)


def select(config: type[C], source: Any) -> C:
    """A config of another command from the options that the two share (train running cache-latents)."""
    wanted = {opt.name for opt in all_options(config)}
    return make(config, {k: v for k, v in flatten(source).items() if k in wanted and v is not None})


def _names(config: type) -> dict[str, Option]:
    names: dict[str, Option] = {}
    for opt in all_options(config):
        for name in (opt.name, *opt.traits.aliases):
            assert name not in names, f"`{name}` is declared twice for {config.__name__}"
            names[name] = opt
    return names


def _collect(
    given: Mapping[str, Any],
    by_name: Mapping[str, Option],
    place: str,
    values: dict[str, tuple[Any, str]],
    problems: list[str],
) -> None:
    for key, raw in given.items():
        if raw is None:
            continue
        opt = by_name.get(key)
        if opt is None:
            hint = did_you_mean(key, by_name)
            problems.append(f"unknown key `{key}`{place}" + (f"; {hint}" if hint else ""))
        else:
            values[opt.name] = (raw, place)


def _checked(opt: Option, raw: Any, place: str, problems: list[str]) -> Any:
    """The value in its declared type, or the default after noting what is wrong."""
    try:
        if opt.many:
            items = raw if isinstance(raw, (list, tuple)) else [raw]
            if opt.traits.count is not None and items and len(items) % opt.traits.count == 0:
                items = items[-opt.traits.count :]  # of a repeated flag the last counts
            if opt.traits.count is not None and len(items) != opt.traits.count:
                raise ValueError(f"takes {opt.traits.count} values, got {len(items)}")
            value: Any = tuple(_scalar(opt, item) for item in items)
        elif isinstance(raw, (list, tuple)):
            raise ValueError(f"takes one value, got {len(raw)}")
        else:
            value = _scalar(opt, raw)
    except ValueError as error:
        problems.append(f"{opt.label}{place} {error}")
        return opt.default
    if opt.traits.later is not None and value != opt.default and value not in opt.traits.available:
        problems.append(f"{opt.label}{place} is not available yet: {opt.traits.later}")
    if not opt.many and value in opt.traits.refused:
        problems.append(f"{opt.label}{place} cannot be `{value}`: {opt.traits.refused[value]}")
    return value


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
        return Path(str(raw)).expanduser()
    if not isinstance(raw, str):
        raise ValueError(f"must be text, got `{raw}`")
    return opt.traits.synonyms.get(raw, raw)


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
            f"must be {'above' if traits.exclusive_minimum else 'at least'} {traits.minimum:g}, got {value:g}"
        )
    if traits.maximum is not None and value > traits.maximum:
        raise ValueError(f"must be at most {traits.maximum:g}, got {value:g}")
    if traits.multiple_of is not None and value % traits.multiple_of:
        lower = value - value % traits.multiple_of
        around = f"{lower} or {lower + traits.multiple_of}" if lower else f"{traits.multiple_of}"
        raise ValueError(f"must be a multiple of {traits.multiple_of}, got {value} (nearest: {around})")


def _all_problems(problems: list[str]) -> HyimgError:
    if len(problems) == 1:
        return HyimgError(problems[0])
    return HyimgError("\n  ".join(["several options are wrong:", *problems]))


def _assemble(config: type[C], resolved: Mapping[str, Any]) -> C:
    groups = {
        name: group(**{opt.name: resolved[opt.name] for opt in options_of(group)})
        for name, group in groups_of(config).items()
    }
    return config(**groups)
