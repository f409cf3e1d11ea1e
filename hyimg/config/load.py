"""From flags and a TOML run file to a command's frozen config.

Flags win over the file, the file over the defaults; the settings of a picture (`infer --from_image`) stand between
flags and file. Everything wrong is found in one pass and raised as one error, so that a user mends a command line
once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli

from hyimg.config import legacy
from hyimg.config.option import Option, all_options, groups_of, options_of
from hyimg.config.picture import picture_options
from hyimg.config.values import checked
from hyimg.errors import HyimgError, did_you_mean, nearest

C = TypeVar("C")

# How a run file is named on the command line; one file cannot name another
_RUN_FILE_KEYS = ("config", "config_file")
# What lies in the root of a diffusers pipeline
_PIPELINE_MARK = "model_index.json"


def read_run_file(path: Path) -> dict[str, Any]:
    """The keys of a TOML run file, tables flattened (a table is only a heading).

    Raises HyimgError where the file is missing, is no TOML, or says one key twice.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise HyimgError(f"the run file `{path}` is a device or a pipe", hint="give the name of a file")
        document = tomli.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise HyimgError(
            f"cannot read the run file `{path}`: {error.strerror}",
            hint="give `--config` an existing TOML file",
        ) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HyimgError(f"the run file `{path}` is not valid TOML: {error}") from error
    except RecursionError as error:
        raise HyimgError(f"the run file `{path}` is nested too deeply") from error
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
        nested = [key for key in _RUN_FILE_KEYS if from_file.pop(key, None) is not None]
        problems += [f"`{key}` in `{run_file}`: a run file cannot name another one" for key in nested]
        _collect(from_file, by_name, f" in `{run_file}`", values, problems)
    _collect_from_picture(given, by_name, values, problems)
    _collect(given, by_name, "", values, problems)

    if notes is not None:
        typed = {by_name[key].name for key, value in given.items() if value is not None and key in by_name}
        notes += [f"{opt.label}: {opt.traits.note}" for opt in all_options(config) if _is_noted(opt, typed)]

    resolved: dict[str, Any] = {}
    for opt in all_options(config):
        if opt.name in values:
            raw, place = values[opt.name]
            resolved[opt.name] = checked(opt, raw, place, problems)
        else:
            resolved[opt.name] = opt.default
        resolved[opt.name] = _part_of_pipeline(opt, resolved[opt.name], notes)
    required = getattr(config, "REQUIRED", ())
    problems += [f"{by_name[name].label} is required" for name in required if resolved[name] in (None, ())]
    if problems:
        raise _all_problems(problems)
    return _assemble(config, resolved)


def replace(config: C, **changes: Any) -> C:
    """A copy of a config with some options changed, checked like typed ones."""
    values = {**flatten(config, secrets=True), **changes}
    return make(type(config), {k: v for k, v in values.items() if v is not None})


def flatten(config: Any, *, secrets: bool = False) -> dict[str, Any]:
    """All options of a config by name, in order of declaration; those that are secret only with `secrets`."""
    values: dict[str, Any] = {}
    for name, group in groups_of(type(config)).items():
        options = (opt for opt in options_of(group) if secrets or not opt.traits.is_secret)
        values.update({opt.name: getattr(getattr(config, name), opt.name) for opt in options})
    return values


def secrets_of(config: Any) -> list[str]:
    """The values of a config that must be neither written nor shown."""
    values = flatten(config, secrets=True)
    return [
        values[opt.name] for opt in all_options(type(config)) if opt.traits.is_secret and values[opt.name]
    ]


def check_inputs(config: Any) -> None:
    """Raises one HyimgError that names every option whose file or folder is not there."""
    found = [(label, _input_problem(path)) for label, path in _inputs(config)]
    missing = [f"{label}: {text}" for label, text in found if text is not None]
    if missing:
        raise _all_problems(missing)


def require_no_input(config: Any, output: Path, label: str) -> None:
    """Raises HyimgError, naming the option `label`, where a file to write would replace one that is read."""
    for option, path in _inputs(config):
        if output.exists() and output.samefile(path):
            raise HyimgError(f"{label} `{output}` is the {option} itself", hint="name another file")


def _inputs(config: Any) -> Iterator[tuple[str, Path]]:
    """What a config reads, each file or folder with its option."""
    values = flatten(config)
    for opt in all_options(type(config)):
        if opt.traits.is_input and values[opt.name] is not None:
            yield from ((opt.label, path) for path in (values[opt.name] if opt.many else (values[opt.name],)))


def _input_problem(path: Path) -> str | None:
    """Why a path cannot be read as a file or a folder, or None where it can be tried."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        guess = did_you_mean_file(path)
        return f"there is no file `{path}`" + (f"; {guess}" if guess else "")
    except OSError as error:
        return f"`{path}` cannot be read: {error.strerror}"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return f"`{path}` is a device or a pipe, not a file"
    return None


def did_you_mean_file(path: Path) -> str | None:
    """A hint for the misspelt name of a file, of those beside it; None where nothing looks like it.

    Stems are compared: an ending as long as `.safetensors` makes any two files look alike.
    """
    try:
        beside = sorted(path.parent.iterdir())
    except OSError:
        return None
    names = {other.stem: other.name for other in beside}
    # of the same name where only the ending is another, or was left out
    close = [stem for stem in dict.fromkeys((path.stem, path.name)) if stem in names]
    if not close:
        close = nearest(path.stem, [other.stem for other in beside if other.suffix == path.suffix])
    return f"did you mean {' or '.join(f'`{names[stem]}`' for stem in close)}?" if close else None


def select(config: type[C], source: Any) -> C:
    """A config of another command from the options that the two share (train running cache-latents)."""
    wanted = {opt.name for opt in all_options(config)}
    return make(config, {k: v for k, v in flatten(source).items() if k in wanted and v is not None})


def _part_of_pipeline(opt: Option, value: Any, notes: list[str] | None) -> Any:
    """A model's own folder where the root of a diffusers pipeline was given: it is what is read, and hashed."""
    part = opt.traits.pipeline_part
    # os.path's, which takes whatever cannot be a path for one that is not there
    if part is None or not isinstance(value, Path) or not os.path.isfile(value / _PIPELINE_MARK):
        return value
    if notes is not None:
        notes.append(f"{opt.label}: `{value}` is a diffusers pipeline, of which `{part}` is read")
    return value / part


def _names(config: type) -> dict[str, Option]:
    names: dict[str, Option] = {}
    for opt in all_options(config):
        for name in (opt.name, *opt.traits.aliases):
            assert name not in names, f"`{name}` is declared twice for {config.__name__}"
            names[name] = opt
    return names


def _is_noted(opt: Option, typed: set[str]) -> bool:
    return opt.traits.note is not None and opt.name in typed


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


def _collect_from_picture(
    given: Mapping[str, Any],
    by_name: Mapping[str, Option],
    values: dict[str, tuple[Any, str]],
    problems: list[str],
) -> None:
    """The settings of the picture that the command line, or the run file, names.

    What the picture was made without takes the run file's value away.
    """
    path = given.get("from_image") or values.get("from_image", (None, ""))[0]
    if path is None or "from_image" not in by_name:
        return
    options = picture_options(Path(path), given)
    for name in options:
        values.pop(name, None)
    made_with = {name: value for name, value in options.items() if value != []}
    _collect(made_with, by_name, f" in `{path}`", values, problems)


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
