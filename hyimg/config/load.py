"""From flags and a TOML run file to a command's frozen config.

Flags win over the file, and the file over the defaults; the settings of an image (`infer --from_image`) come between
flags and file, and what a preset sets comes right after what is given next to it. All problems are collected and raised
as one error, so that a command line is corrected once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from hyimg.config import legacy
from hyimg.config.command_table import options_of_all_commands
from hyimg.config.image_file import image_options
from hyimg.config.option import (
    CommandOptions,
    Option,
    all_options,
    as_typed,
    groups_of,
    needs_of,
    options_of,
    unmet,
    values_of,
)
from hyimg.config.run_file import existing_run_file, is_resolved, read_run_file
from hyimg.config.values import check_value
from hyimg.errors import HyimgError, did_you_mean, first_few, first_lines, nearest

C = TypeVar("C", bound=CommandOptions)

# How a run file is named on the command line; a run file cannot name another
_RUN_FILE_KEYS = ("config", "config_file")
# The file in the root of a diffusers pipeline
_PIPELINE_MARK = "model_index.json"
# A file with more unknown keys is of another kind, and the nearest names would not help
_LISTED_KEYS = 4
_LISTED_PROBLEMS = 10


def make(
    config: type[C],
    given: Mapping[str, Any],
    *,
    run_file: Path | None = None,
    notes: list[str] | None = None,
) -> C:
    """A config from what was given, checked.

    `given` maps option names (or aliases) to values as typed (text) or as Python values; None counts as not given. It
    overrides the run file. What is assumed or ignored is appended to `notes`; which options have no effect with the
    others is for `hyimg.config.option` to say.

    Raises:
        HyimgError: one that lists all problems.
    """
    sources = _Sources(config, [] if notes is None else notes)
    if run_file is not None:
        if given.get("output_config") and not existing_run_file(run_file).exists():
            raise HyimgError(
                f"there is no run file `{run_file}`",
                hint="`--config` is read; `--output_config` writes `OUTPUT_NAME.run.toml` into `--output_dir`",
            )
        sources.add_run_file(existing_run_file(run_file))
    in_file = sources.given - sources.preset
    sources.add_image(given)
    typed = sources.add_flags(given)
    values = sources.checked()
    without_effect = sources.refuse(values)
    if run_file is not None:
        sources.note_code(existing_run_file(run_file), values)
    if sources.silent:
        listed = first_few(sources.silent, limit=12)
        sources.notes.append(f"ignored, since it changes nothing in this run: {listed}")
    sources.problems += [
        f"{opt.label} is required"
        for opt in all_options(config)
        if opt.required and opt.name not in sources.given
    ]
    if sources.problems:
        raise _all_problems(sources.problems)
    given_names = frozenset((typed | (in_file & sources.given)) - without_effect)
    groups = {
        name: group(**{opt.name: values[opt.name] for opt in options_of(group)})
        for name, group in groups_of(config).items()
    }
    return cast(Any, config)(given=given_names, **groups)  # type: ignore[no-any-return]


class _Sources:
    """What the run file, an image and the command line give, each over the one before it, and all that is wrong."""

    def __init__(self, config: type, notes: list[str]) -> None:
        self.config = config
        self.notes = notes
        self.problems: list[str] = []
        self.silent: list[str] = []
        """Values that say "not given", as they were written."""
        self.preset: set[str] = set()
        """The options whose value a preset gives."""
        self._by_name = _names(config)
        self._raw: dict[str, tuple[Any, str]] = {}  # value and place by option

    @property
    def given(self) -> set[str]:
        return set(self._raw)

    def add_run_file(self, run_file: Path) -> None:
        """The keys of a run file; those of other commands are ignored, with a note."""
        by_name = self._by_name
        keys = read_run_file(run_file)
        silent = legacy.values_that_say_nothing(keys, frozenset(by_name))
        read = legacy.translate_mapping(keys, frozenset(by_name), self.problems, self.notes)
        nested = [key for key in _RUN_FILE_KEYS if read.pop(key, None) is not None]
        self.problems += [f"`{key}` in `{run_file}`: a run file cannot name another one" for key in nested]
        for key in [key for key in read if key in by_name and _is_nothing(by_name[key], read[key])]:
            value = read.pop(key)
            if not _is_default(by_name[key], value):
                silent[key] = value
        self.silent += [f"`{legacy.written(key, value)}`" for key, value in silent.items()]
        if is_resolved(run_file):
            read = {
                key: value
                for key, value in read.items()
                if key not in by_name or not _is_default(by_name[key], value)
            }
        elsewhere = [key for key in read if key not in by_name and key in _names_of_all_commands()]
        if elsewhere:
            listed = first_few([f"`{key}`" for key in elsewhere])
            self.notes.append(f"options of other commands in `{run_file}` are ignored: {listed}")
        self._add({key: value for key, value in read.items() if key not in elsewhere}, f" in `{run_file}`")

    def add_image(self, given: Mapping[str, Any]) -> None:
        """The settings of the image that the command line, or the run file, names.

        Options that the image was made without lose the run file's value.
        """
        path = given.get("from_image") or self._raw.get("from_image", (None, ""))[0]
        if path is None or "from_image" not in self._by_name:
            return
        options = image_options(Path(path), given)
        for name in options:
            self._raw.pop(name, None)
        self._add({name: value for name, value in options.items() if value != []}, f" in `{path}`")

    def add_flags(self, given: Mapping[str, Any]) -> set[str]:
        """What was typed; returns the options that are given so. A value that says "not given" wins over the file."""
        typed = {key: value for key, value in given.items() if value is not None}
        for key, value in given.items():
            # an empty text may be a variable of the shell that is not set: it is checked like any other
            opt = self._by_name.get(key)
            if opt is not None and value not in ("", []) and _is_nothing(opt, value):
                self._raw.pop(opt.name, None)
                del typed[key]
                if not _is_default(opt, value):
                    self.silent.append(as_typed(key, value))
        self._add(typed, "")
        names = {self._by_name[key].name for key in typed if key in self._by_name}
        self.notes += [
            f"{opt.label}: {opt.note}" for opt in all_options(self.config) if opt.note and opt.name in names
        ]
        return names

    def _add(self, given: Mapping[str, Any], place: str) -> None:
        """Values by option or alias, after what they set of others."""
        known = {key: self._by_name[key] for key in given if key in self._by_name}
        for key, opt in known.items():
            raw = given[key]
            for name, value in (opt.sets.get(raw, {}) if isinstance(raw, str) else {}).items():
                self._raw.pop(name, None)
                if value is not None:
                    self._raw[name] = (value, place)
                    self.preset.add(name)
        for key, opt in known.items():
            if given[key] is not None:
                self._raw[opt.name] = (given[key], place)
                self.preset.discard(opt.name)
        unknown = [key for key in given if key not in known and given[key] is not None]
        if len(unknown) > _LISTED_KEYS:
            self.problems.append(f"unknown keys{place}: {first_few([f'`{key}`' for key in unknown])}")
        else:
            for key in unknown:
                hint = did_you_mean(key, self._by_name)
                self.problems.append(f"unknown key `{key}`{place}" + (f"; {hint}" if hint else ""))

    def checked(self) -> dict[str, Any]:
        """The value of every option; the default where none is given or it is wrong."""
        values = {}
        for opt in all_options(self.config):
            value = opt.default
            if opt.name in self._raw:
                raw, place = self._raw[opt.name]
                if opt.kind == "path" or opt.text == "path":
                    raw = self._without_spaces(opt, raw, place)
                try:
                    value = check_value(opt, raw)
                except ValueError as error:
                    self.problems.append(f"{opt.label}{place} {error}")
            part = opt.pipeline_part
            # os.path's, for which what cannot be a path does not exist
            if part is not None and isinstance(value, Path) and os.path.isfile(value / _PIPELINE_MARK):
                self.notes.append(f"{opt.label}: `{value}` is a diffusers pipeline; its `{part}` is read")
                value = value / part
            values[opt.name] = value
        return values

    def _without_spaces(self, opt: Option, raw: Any, place: str) -> Any:
        """A path, or each of several, without spaces around it, unless a file of exactly that name exists."""
        if isinstance(raw, (list, tuple)):
            return [self._without_spaces(opt, item, place) for item in raw]
        if (
            not isinstance(raw, str)
            or raw == (bare := raw.strip(" \t\r\n"))
            or not bare
            or os.path.lexists(raw)
        ):
            return raw
        self.notes.append(f"{opt.label}{place}: the spaces around `{bare}` are removed")
        return bare

    def refuse(self, values: dict[str, Any]) -> set[str]:
        """Adds a problem for each refused value that would have an effect; others return to their default.

        Returns the options that are at their default for that reason.
        """
        without_effect = set()
        for opt in all_options(self.config):
            if opt.name not in self._raw or opt.many or values[opt.name] not in opt.refused:
                continue
            value, place = values[opt.name], self._raw[opt.name][1]
            reason = unmet(needs_of(self.config, opt), value, values)
            if reason is None:
                text = str(value).lower() if isinstance(value, bool) else value
                self.problems.append(f"{opt.label}{place} cannot be `{text}`: {opt.refused[value]}")
            else:
                self.silent.append(f"{as_typed(opt.name, value)} ({reason})")
                values[opt.name] = opt.default
                without_effect.add(opt.name)
        return without_effect

    def note_code(self, run_file: Path, values: Mapping[str, Any]) -> None:
        """Notes the code that the run file makes the command import, if any."""
        named = [
            f"`{value}` (`{opt.name}`)"
            for opt in all_options(self.config)
            if opt.imports is not None and self._raw.get(opt.name, (None, ""))[1]
            for value in (values[opt.name] if opt.many else [values[opt.name]])
            if opt.imports == "any" or "." in str(value)
        ]
        if named:
            self.notes.append(f"`{run_file}` makes this command import code: {first_few(named)}")


def _is_nothing(opt: Option, value: Any) -> bool:
    """Whether a value says "not given", as other tools write it."""
    if isinstance(value, (bool, tuple)) or value is None:
        return False
    return (opt.optional and value in ("", [])) or legacy.is_one_of(value, opt.means_nothing)


def _is_default(opt: Option, value: Any) -> bool:
    """Whether a value, typed or from a file, is the default."""
    if isinstance(value, list):
        return bool(tuple(value) == opt.default)
    return bool(value == opt.default) or legacy.is_one_of(value, (opt.default,))


def _names(config: type) -> dict[str, Option]:
    names: dict[str, Option] = {}
    for opt in all_options(config):
        for name in opt.names:
            assert name not in names, f"`{name}` is declared twice for {config.__name__}"
            names[name] = opt
    return names


@functools.cache
def _names_of_all_commands() -> frozenset[str]:
    return frozenset(name for opt in options_of_all_commands() for name in opt.names)


def _all_problems(problems: list[str]) -> HyimgError:
    if len(problems) == 1:
        return HyimgError(problems[0])
    return HyimgError("several options are wrong:", details=first_lines(problems, limit=_LISTED_PROBLEMS))


def replace(config: C, **changes: Any) -> C:
    """A copy of a config with some options changed, checked like typed ones."""
    values = {**values_of(config), **changes}
    made = make(type(config), {k: v for k, v in values.items() if v is not None})
    return cast(C, dataclasses.replace(cast(Any, made), given=cast(Any, config).given))


def flatten(config: Any, *, secrets: bool = False) -> dict[str, Any]:
    """All options of a config by name, in order of declaration; secret ones only with `secrets`."""
    secret = {opt.name for opt in all_options(type(config)) if opt.text == "secret" and not secrets}
    return {name: value for name, value in values_of(config).items() if name not in secret}


def secrets_of(config: Any) -> list[str]:
    """The values of a config that must be neither written nor shown."""
    values = flatten(config, secrets=True)
    return [
        values[opt.name] for opt in all_options(type(config)) if opt.text == "secret" and values[opt.name]
    ]


def check_inputs(config: Any) -> None:
    """Raises one HyimgError that names every option whose file or folder does not exist."""
    found = [(label, _input_problem(path)) for label, path in _inputs(config)]
    missing = [f"{label}: {text}" for label, text in found if text is not None]
    if missing:
        raise _all_problems(missing)


def require_no_input(config: Any, output: Path, label: str) -> None:
    """Raises HyimgError, naming the option `label`, if the file to write is one that is read."""
    for option, path in _inputs(config):
        if output.exists() and output.samefile(path):
            raise HyimgError(f"{label} `{output}` is the {option} itself", hint="give another file")


def _inputs(config: Any) -> Iterator[tuple[str, Path]]:
    """The files and folders that a config reads, each with its option."""
    values = flatten(config)
    for opt in all_options(type(config)):
        if opt.is_input and values[opt.name] is not None:
            yield from ((opt.label, path) for path in (values[opt.name] if opt.many else (values[opt.name],)))


def _input_problem(path: Path) -> str | None:
    """Why a path cannot be read as a file or a folder, or None."""
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
    """A hint for a misspelt file name, from the names in the same folder; None if none is similar.

    Stems are compared: an ending as long as `.safetensors` makes any two files look alike.
    """
    try:
        siblings = sorted(path.parent.iterdir())
    except OSError:
        return None
    names = {other.stem: other.name for other in siblings}
    # the same name with another ending, or without one
    close = [stem for stem in dict.fromkeys((path.stem, path.name)) if stem in names]
    if not close:
        close = nearest(path.stem, [other.stem for other in siblings if other.suffix == path.suffix])
    return f"did you mean {' or '.join(f'`{names[stem]}`' for stem in close)}?" if close else None


def select(config: type[C], source: Any) -> C:
    """A config of another command from the options that the two share (train running cache-latents)."""
    wanted = {opt.name for opt in all_options(config)}
    made = make(config, {k: v for k, v in flatten(source).items() if k in wanted and v is not None})
    return cast(C, dataclasses.replace(cast(Any, made), given=source.given & wanted))
