"""Reading and parsing files that users write, and JSON from any source.

`read_bounded` and `read_text` read regular files up to a size. `parse_document` parses run files, dataset files and
prompt files, and explains common mistakes: Windows paths in double quotes, text without quotes, a file of another kind
or of another tool. `parse_json` is the only place that decodes JSON, since untrusted files may hold more than Python's
decoder refuses: deep nesting, huge numbers, half surrogates.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli

from hyimg.errors import HyimgError, raise_system_limit
from hyimg.report import size_text

_DOUBLE_QUOTED = re.compile(r'"([^"]*\\[^"]*)"')
_PAIR = re.compile(r"\s*([\w.-]+)\s*=\s*(.+?)\s*")
_YAML_LINE = re.compile(r"(?:- )?[\w-]+:(?:\s.*)?|---\s*")
# A longer line was not typed by a person, and the patterns below search it repeatedly
_HINTED_CHARS = 1000
BACKSLASH = "in double quotes a backslash begins an escape"


def is_yaml(text: str) -> bool:
    """Whether the first two lines that are not empty are YAML, not TOML."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return bool(lines) and all(_YAML_LINE.fullmatch(line.strip()) for line in lines[:2])


def yaml_tool(text: str) -> str:
    is_toolkit = re.search(r"^job:", text, re.MULTILINE) and re.search(r"^config:", text, re.MULTILINE)
    return "an ai-toolkit configuration" if is_toolkit else "YAML"


def toml_hint(text: str, error: Exception) -> str | None:
    """How to correct the line that cannot be parsed, if the mistake is a common one."""
    line = _line(text, error)
    if len(line) > _HINTED_CHARS:
        return None
    if (quoted := _DOUBLE_QUOTED.search(line)) is not None:
        fixed = f"'{quoted[1]}'" if "'" not in quoted[1] else f'"{quoted[1].replace(chr(92), "/")}"'
        return f"{BACKSLASH}: write a path with `/`, or in single quotes: `{line.replace(quoted[0], fixed).strip()}`"
    if (pair := _PAIR.fullmatch(line)) is None:
        return None
    key, value = pair[1], pair[2].partition(" #")[0].strip()
    if value.startswith(('"', "'", "[", "{")):
        return _backslash_at_end(key, value)
    if value in ("True", "False"):
        return f"write `{key} = {value.lower()}`"
    if value in ("None", "null"):
        return f"TOML has no null value: omit `{key}`"
    if re.fullmatch(r"[+-]?(\.\d+|\d+\.)", value):
        return f"a number needs a digit on both sides of the point: `{key} = {float(value)}`"
    return None if re.match(r"[\d+.-]", value) else f"text needs quotes: `{key} = '{value}'`"


def _backslash_at_end(key: str, value: str) -> str | None:
    if value.startswith('"') and value.endswith('\\"'):
        return f"{BACKSLASH}: write a path with `/`, or in single quotes: `{key} = '{value[1:-1]}'`"
    return None


def json_hint(text: str, error: Exception) -> str | None:
    if "escape" in str(error) and "\\" in _line(text, error):
        return f"{BACKSLASH}: write a path with `/`, or with `\\\\` for each backslash"
    return None


def _line(text: str, error: Exception) -> str:
    """The line of a parser's error; the last one that is not empty where it says "at end of document"."""
    number: int | None = getattr(error, "lineno", None)
    if number is None and (match := re.search(r"line (\d+)", str(error))):
        number = int(match[1])
    lines = text.splitlines()
    if number is not None and 0 < number <= len(lines):
        return lines[number - 1]
    return next((line for line in reversed(lines) if line.strip()), "")


def escaped(text: str) -> str:
    """The text with control characters escaped, as in double quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("\\\\", "\\")


DOCUMENT_BYTES = 32_000_000
"""The largest run file, dataset file or prompt file."""

# A pipe without a writer must not block, nor a terminal become the process's own
_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_NONBLOCK", "O_NOCTTY"))
_READ_BYTES = 1 << 16
_KINDS_OF_FILE = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

DocumentKind = Literal["run file", "dataset file", "prompt file"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_JSON_BYTES = 100_000_000
"""The longest JSON that is read, as long as a safetensors header may be."""
MAX_DEPTH = 64
"""The deepest nesting of lists and tables; all that hyimg reads needs fewer than ten levels."""
MAX_DIGITS = 300
"""The longest whole number: such numbers are finite as floats, and 128-bit generator states are shorter."""

# Numbers that may have more digits than that, or overflow a float
_LARGE_NUMBER = re.compile(rf"[0-9](?:[0-9]{{{MAX_DIGITS}}}|[eE]\+?[0-9]{{3}})")
_TOO_DEEP = f"is nested too deeply: more than {MAX_DEPTH} levels"
_TOO_LARGE = f"has a whole number of more than {MAX_DIGITS} digits"
_HALF_CHARACTER = "has half of a surrogate pair in a text, which is not a character"

_GIVEN_WITH: Mapping[DocumentKind, str] = {
    "run file": "give it with `--config`",
    "dataset file": "give it with `--dataset_config`",
    "prompt file": "give it with `--sample_prompts`, or `--from_file` of `hyimg infer`",
}


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; links are followed.

    Raises OSError as `open` does, and, before reading anything, for a folder, a pipe, a device or a larger file, with
    the kind or the limit in `strerror`. Raises SystemLimitError, which is not an OSError, if the process has no file
    descriptor left.
    """
    descriptor = open_regular(path, limit)
    try:
        # files without a size (as in /proc) and files that grow are read past their size
        parts, room = [], limit + 1
        at_once = max(os.fstat(descriptor).st_size + 1, _READ_BYTES)  # a large file is not joined from parts
        while room > 0 and (part := os.read(descriptor, min(room, at_once))):
            parts.append(part)
            room -= len(part)
    finally:
        os.close(descriptor)
    if room <= 0:
        raise _too_large(path, limit)
    return b"".join(parts)


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """The text of a UTF-8 file, read as `read_bounded`: a byte order mark is skipped, line ends become `\\n`.

    Raises OSError as `read_bounded`, and UnicodeDecodeError.
    """
    return read_bounded(path, limit).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> int:
    """A descriptor for reading a regular file of at most `limit` bytes; raises as `read_bounded`."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise_system_limit(error)
        if error.errno == errno.ENXIO:  # a socket, or a device that does not exist
            raise OSError(errno.ENXIO, "it is a socket or a device, not a file", os.fspath(path)) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path, status.st_mode)
        if limit is not None and status.st_size > limit:
            raise _too_large(path, limit)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def require_regular(path: str | os.PathLike[str], limit: int | None = None) -> None:
    """Raises OSError as `read_bounded` without reading: for files that another library opens."""
    os.close(open_regular(path, limit))


def _not_regular(path: str | os.PathLike[str], mode: int) -> OSError:
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    kind = next((name for is_kind, name in _KINDS_OF_FILE if is_kind(mode)), "a special file")
    return OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))


def _too_large(path: str | os.PathLike[str], limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {size_text(limit)}, the limit", os.fspath(path))


def parse_document(text: str, path: Path, kind: DocumentKind, *, path_keys: Collection[str] = ()) -> Any:
    """The content of a file of that kind: JSON if its name ends in `.json`, else TOML.

    `path_keys` are keys whose values are paths. Raises HyimgError, with the corrected line where possible, for what
    cannot be parsed, for a path with a control character, and for a file of another kind or another tool.
    """
    is_json = path.suffix.lower() == ".json"
    try:
        document = _decode_json(text) if is_json else _decode_toml(text)
    except _UnusableError as error:
        raise HyimgError(f"the {kind} `{path}` {error}") from None
    except ValueError as error:
        if not is_json and is_yaml(text):
            raise _wrong_kind(path, kind, yaml_tool(text)) from None
        name = "JSON" if is_json else "TOML"
        hint = json_hint(text, error) if is_json else toml_hint(text, error)
        raise HyimgError(f"the {kind} `{path}` is not valid {name}: {error}", hint=hint) from None
    found = kind_of(document)
    if found is not None and found != kind:
        raise _wrong_kind(path, kind, found)
    for key, value in _texts(document):
        if key in path_keys and _CONTROL.search(value):
            raise _not_a_path(path, key, value, is_json)
    return document


def parse_json(
    text: str | bytes,
    name: str,
    *,
    kind: type | None = dict,
    limit: int = MAX_JSON_BYTES,
    repeated: list[str] | None = None,
) -> Any:
    """The value of JSON from an untrusted source; bytes are UTF-8, with or without a byte order mark.

    `name` is the subject of the error's sentence. `kind` is the type that the value must have, None for any. Keys that
    an object has twice are appended to `repeated`, and the last one counts; without `repeated` they are an error.

    Raises HyimgError for more than `limit` bytes (or characters), invalid JSON, more than `MAX_DEPTH` levels, whole
    numbers of more than `MAX_DIGITS` digits, numbers that are not finite, half surrogates, and another type.
    """
    if len(text) > limit:
        raise HyimgError(f"{name} has {len(text)} bytes of JSON; at most {limit} are read")
    try:
        value = _decode_json(text if isinstance(text, str) else text.decode("utf-8-sig"), repeated)
    except _UnusableError as error:
        raise HyimgError(f"{name} {error}") from None
    except UnicodeDecodeError as error:
        raise HyimgError(f"{name} is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise HyimgError(f"{name} is not valid JSON: {error}") from None
    if kind is not None and not isinstance(value, kind):
        raise HyimgError(f"{name} must be {_type_name(kind)}, not {_type_name(type(value))}")
    return value


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The tables of TOML that a program wrote; `name` and errors as in `parse_json`."""
    try:
        return _decode_toml(text)
    except _UnusableError as error:
        raise HyimgError(f"{name} {error}") from None
    except ValueError as error:
        raise HyimgError(f"{name} is not valid TOML: {error}") from None


class _UnusableError(ValueError):
    """What the parser accepts and later code cannot use; the message is a predicate."""


def _decode_json(text: str, repeated: list[str] | None = None) -> Any:
    if repeated is None:
        decoder = _STRICT_DECODER
    else:
        decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: _table(pairs, repeated))
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise _UnusableError(_TOO_DEEP) from None
    except (_UnusableError, json.JSONDecodeError):
        raise
    except ValueError:  # Python refuses numbers of thousands of digits
        raise _UnusableError(_TOO_LARGE) from None
    if not (text.isascii() or is_encodable(text)):
        raise _UnusableError(_HALF_CHARACTER)
    # brackets within texts count too, which only means more frequent checks
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _require_shallow(value)
    if any(mark in text for mark in ("\\ud", "\\uD", "NaN", "Infinity")) or _LARGE_NUMBER.search(text):
        _require_usable(value, allow_infinite=False)
    return value


def _table(pairs: list[tuple[str, Any]], repeated: list[str] | None = None) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        again = [key for key, count in counts.items() if count > 1]
        if repeated is None:
            raise _UnusableError(f"has the key `{again[0]}` twice in one object")
        repeated.extend(again)
    return table


_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_table)


def _decode_toml(text: str) -> dict[str, Any]:
    try:
        value = tomli.loads(text)
    except RecursionError:
        raise _UnusableError(_TOO_DEEP) from None
    except tomli.TOMLDecodeError:
        raise
    except ValueError:
        raise _UnusableError(_TOO_LARGE) from None
    _require_shallow(value)  # dotted keys nest without brackets
    if _LARGE_NUMBER.search(text):
        _require_usable(
            value, allow_infinite=True
        )  # `inf` and `nan` are valid TOML, and checked with the options
    return value


def _require_shallow(document: object) -> None:
    """Raises _UnusableError for more than `MAX_DEPTH` levels. Not recursive; fast for 100,000s of values."""
    level, depth = [document], 0
    while level := [value for value in level if type(value) is dict or type(value) is list]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise _UnusableError(_TOO_DEEP)
        level = [below for value in level for below in (value.values() if type(value) is dict else value)]


def _require_usable(document: object, *, allow_infinite: bool) -> None:
    """Raises _UnusableError for texts and numbers that the parser accepts and later code fails on."""
    if isinstance(document, dict):
        for key, value in document.items():
            _require_usable(key, allow_infinite=allow_infinite)
            _require_usable(value, allow_infinite=allow_infinite)
    elif isinstance(document, list):
        for value in document:
            _require_usable(value, allow_infinite=allow_infinite)
    elif isinstance(document, str):
        if not is_encodable(document):
            raise _UnusableError(_HALF_CHARACTER)
    elif isinstance(document, int):
        if abs(document) >= 10**MAX_DIGITS:
            raise _UnusableError(_TOO_LARGE)
    elif isinstance(document, float) and not (math.isfinite(document) or allow_infinite):
        raise _UnusableError("has a number that is not finite")


def is_encodable(text: str) -> bool:
    """Whether the text can be encoded as UTF-8, unlike half a surrogate pair (an odd byte of a file name)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_name(kind: type) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, "a number")


def kind_of(document: object) -> str | None:
    """The kind of a document by its keys: one of hyimg's, "a ... file" of another tool, or None."""
    if not isinstance(document, Mapping):
        return None
    datasets = document.get("datasets")
    if isinstance(datasets, list):
        keys = {key for table in datasets if isinstance(table, Mapping) for key in table}
        if keys & {"image_directory", "video_directory", "image_jsonl_file", "cache_directory"}:
            return "a musubi-tuner dataset file"
        return "dataset file"
    if isinstance(document.get("directory"), list):
        return "a diffusion-pipe dataset file"
    if _has(document, "model", "type") or _has(document, "adapter", "type"):
        return "a diffusion-pipe configuration"
    if document.get("job") is not None and isinstance(document.get("config"), Mapping):
        return "an ai-toolkit configuration"
    if {"training_method", "model_type"} <= document.keys() and "concept_file_name" in document:
        return "a OneTrainer configuration"
    prompt = document.get("prompt")
    if isinstance(prompt, Mapping) and ("subset" in prompt or "prompt" in prompt):
        return "prompt file"
    return "run file" if _option_names() & {key.replace("-", "_") for key in document} else None


def control_character_problem(text: str) -> str | None:
    """What is wrong with a path that holds a control character; None for others."""
    if not _CONTROL.search(text):
        return None
    return f"must be a path, got `{escaped(text)}` with a control character; write `/` instead of backslashes"


def _option_names() -> set[str]:
    from hyimg.config.command_table import options_of_all_commands

    return {opt.name for opt in options_of_all_commands() if opt.name != "prompt"}


def _has(document: Mapping[str, Any], table: str, key: str) -> bool:
    return isinstance(document.get(table), Mapping) and key in document[table]


def _wrong_kind(path: Path, kind: DocumentKind, found: str) -> HyimgError:
    if found in _GIVEN_WITH:
        return HyimgError(f"`{path}` is a {found}, not a {kind}", hint=_GIVEN_WITH[found])  # type: ignore[index]
    return HyimgError(
        f"`{path}` is {found}, not a {kind} of hyimg",
        hint="write one with hyimg's own keys (docs/commands.md lists options, docs/dataset.md the dataset file)",
    )


def _not_a_path(path: Path, key: str, value: str, is_json: bool) -> HyimgError:
    typed = escaped(value)
    way_out = "with `\\\\` for each backslash" if is_json else f"in single quotes: `{key} = '{typed}'`"
    return HyimgError(
        f'`{key}` in `{path}` is not a path: part of `"{typed}"` was read as a control character',
        hint=f"{BACKSLASH}: write it with `/`, or {way_out}",
    )


def _texts(document: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a document with its key."""
    if isinstance(document, str):
        yield key.replace("-", "_"), document
    elif isinstance(document, Mapping):
        for name, value in document.items():
            yield from _texts(value, str(name))
    elif isinstance(document, list):
        for value in document:
            yield from _texts(value, key)
