"""Seeded damage to files, by format: bytes, text, JSON, TOML, Python and SQLite.

Each function takes the file's bytes and a `random.Random`, and gives the damaged bytes with a few words on what was
done. One seed gives the same damage everywhere.
"""

from __future__ import annotations

import json
import math
import random
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli

Damaged = tuple[bytes, str]
Mutation = Callable[[bytes, random.Random], Damaged]


class Raw(str):
    """Text that is written into a document as it is."""


class Pairs(list[tuple[str, Any]]):
    """A table whose keys may repeat."""


NASTY_TEXTS = (
    "",
    " ",
    "x" * 20_000,
    "\0",
    "a\nb\rc\tend",
    "\x1b]0;owned\x07\x1b[31mred\x1b[2J",
    "\x9b31m\x85\u2028",
    "\u202egnp.elif\u2066",
    "猫" * 300,
    "../../../../etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "~",
    "{a|b}" * 50,
    "{" * 5000,
    '"' * 3001,
    "a" * 300 + ".png",
    "%s%n{0}{x!r}$HOME",
    "torch.nn.Linear",
    "inf",
    "nan",
    "-1",
    "1e999",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    255,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**64,
    -(2**63),
)
RAW_JSON = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "9" * 5000,
    "-" + "9" * 400,
    '"\\ud800"',
    '"\\udc00\\ud800"',
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 20_000 + "1" + "}" * 20_000,
    "[" * 3000,
    '{"a": 1, "a": 2}',
    "[" + "0," * 20_000 + "0]",
)
RAW_TOML = (
    "nan",
    "inf",
    "1979-05-27",
    "07:32:00",
    "0x7fffffffffffffff",
    "9" * 5000,
    "[" * 2000 + "]" * 2000,
    "{a = " * 500 + "1" + "}" * 500,
    "[[1, 2], ['a']]",
    "{ image_dir = 'images', image_dir = 'images' }",
    "'''a\nb'''",
)


def damage_bytes(data: bytes, rng: random.Random) -> Damaged:
    """Damage that knows nothing of the format."""
    if not data:
        return b"\0" * 16, "zeros in an empty file"
    place = min(rng.randrange(len(data)), rng.randrange(len(data)))  # headers stand in front
    kind = rng.choice(
        [
            "flip",
            "flips",
            "cut",
            "cut",
            "empty",
            "zeros",
            "hole",
            "insert",
            "twice",
            "append",
            "random",
            "drop",
            "word",
        ]
    )
    out = bytearray(data)
    if kind == "flip":
        out[place] ^= 1 << rng.randrange(8)
    elif kind == "flips":
        for _ in range(rng.choice([8, 64, 512])):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        out = out[:place]
    elif kind == "empty":
        out = bytearray()
    elif kind == "zeros":
        out = bytearray(len(data))
    elif kind == "hole":
        end = min(len(out), place + rng.choice([1, 16, 512, 4096]))
        out[place:end] = bytes(end - place)
    elif kind == "insert":
        out[place:place] = rng.randbytes(rng.choice([1, 7, 4096]))
    elif kind == "twice":
        out += data
    elif kind == "append":
        out += rng.randbytes(rng.choice([1, 100, 100_000]))
    elif kind == "random":
        out = bytearray(rng.randbytes(len(data)))
    elif kind == "drop":
        del out[place : place + rng.choice([1, 8, 512])]
    else:
        value = rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])
        out[place : place + 4] = struct.pack(rng.choice(["<I", ">I"]), value)
    return bytes(out), f"bytes: {kind} at {place}"


def damage_text(data: bytes, rng: random.Random) -> Damaged:
    """Damage to text: encodings, odd characters, length."""
    text = data.decode("utf-8", "replace")
    kind = rng.choice(
        ["insert", "insert", "replace", "encode", "lines", "long", "newlines", "surrogate", "marks"]
    )
    place = rng.randrange(len(text) + 1)
    nasty = rng.choice(NASTY_TEXTS)
    if kind == "insert":
        return (text[:place] + nasty + text[place:]).encode(), f"text: {nasty[:20]!r} inserted at {place}"
    if kind == "replace":
        return nasty.encode(), f"text: {nasty[:20]!r}"
    if kind == "encode":
        encoding = rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7", "cp1252"])
        return text.encode(encoding, "replace"), f"text: as {encoding}"
    if kind == "lines":
        return (text + "\n").encode() * rng.choice([2, 20]), "text: lines repeated"
    if kind == "long":
        unit = rng.choice(["a", "a ", "{", '"', "“", "{a|", "--w ", ", ", "\\", "猫"])
        return (text + unit * rng.choice([3000, 30_000])).encode(), f"text: many {unit!r}"
    if kind == "newlines":
        ends = rng.choice(["\r", "\r\n", "\n\n\n", "\x85", "\u2028", "\0"])
        return text.replace("\n", ends).encode() + ends.encode(), f"text: {ends!r} as line ends"
    if kind == "surrogate":
        return data[:place] + b"\xed\xa0\x80\xff\xfe" + data[place:], "text: no UTF-8"
    marks = rng.choice(
        ["--w 10000000", "--s 99999999999", "--d -1", "--l nan", "--fs 0", "--h", "--zz 1", "--w 1e3"]
    )
    return (text.rstrip("\n") + f" {marks}\n").encode(), f"text: {marks} at the end"


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in items:
        found += _nodes(child, (*path, key))
    return found


def damage_tree(tree: Any, rng: random.Random, raw: Sequence[str]) -> tuple[Any, str]:
    """A document with one node changed, removed, repeated or renamed."""
    paths = _nodes(tree)
    path = rng.choice(paths[1:] or paths)
    # of a long table's many alike entries not always the last level: types of containers matter as well
    if len(path) > 1 and rng.random() < 0.2:
        path = path[: rng.randrange(1, len(path) + 1)]
    if not path:
        return Raw(rng.choice(raw)), "tree: another document"
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = rng.choice(
        ["value", "value", "value", "number", "raw", "raw", "remove", "rename", "repeat", "wrap", "add"]
    )
    new: Any = old
    if kind == "value":
        new = rng.choice([*NASTY_TEXTS, True, False, [], {}, [old], {"a": old}, ["a", 1], [[]], {"": {}}])
    elif kind == "number":
        new = rng.choice(NUMBERS)
        if isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.4:
            new = rng.choice([old + 1, old - 1, -old, old * 2, float(old), str(old)])
    elif kind == "raw":
        new = Raw(rng.choice(raw))
    elif kind == "wrap":
        new = [old, old]
    place = "/".join(map(str, path))[:60]
    if kind == "remove":
        del parent[key]
    elif kind in ("rename", "add") and isinstance(parent, dict):
        name = rng.choice(
            [*NASTY_TEXTS, "__metadata__", "plugin", "network_module", "optimizer_type", "constructor"]
        )
        if kind == "rename":
            del parent[key]
        parent[name] = old
    elif kind == "repeat" and isinstance(parent, list):
        parent.extend([old] * rng.choice([1, 50]))
    elif kind == "repeat":
        place += " (key twice)"
        parent[key] = Twice(old, rng.choice([old, 0, "x"]))
    else:
        parent[key] = new
    return tree, f"tree: {kind} at {place} {str(new)[:30] if kind in ('value', 'number', 'raw') else ''!r}"


class Twice:
    """A value that is written under its key, and then another under the same key."""

    def __init__(self, first: object, second: object) -> None:
        self.values = first, second


def dump_json(value: Any) -> str:
    """JSON with `Raw` and `Twice` in it; half surrogates are escaped."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Twice):
        return dump_json(value.values[0])
    if isinstance(value, dict):
        parts = []
        for key, child in value.items():
            children = child.values if isinstance(child, Twice) else (child,)
            parts += [f"{json.dumps(str(key))}: {dump_json(one)}" for one in children]
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump_json, value)) + "]"
    return json.dumps(value)


def dump_toml(tree: Any) -> str:
    """TOML, every table inline below the first level but arrays of tables, with `Raw` and `Twice` in it."""
    if not isinstance(tree, dict):
        return f"value = {_toml_value(tree)}"
    lines: list[str] = []
    _toml_table(tree, (), lines)
    return "\n".join(lines) + "\n"


def _toml_table(table: dict[str, Any], prefix: tuple[str, ...], lines: list[str]) -> None:
    later = []
    for key, value in table.items():
        if (isinstance(value, dict) and value) or (
            isinstance(value, list) and value and all(isinstance(one, dict) and one for one in value)
        ):
            later.append((key, value))
            continue
        values = value.values if isinstance(value, Twice) else (value,)
        lines.extend(f"{_toml_key(key)} = {_toml_value(one)}" for one in values)
    for key, value in later:
        place = (*prefix, key)
        name = ".".join(map(_toml_key, place))
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            _toml_table(one, place, lines)


def _toml_key(key: object) -> str:
    return json.dumps(str(key), ensure_ascii=True).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Twice):
        return _toml_value(value.values[0])
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if value != value else ("-" if value < 0 else "") + "inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def damage_json(data: bytes, rng: random.Random) -> Damaged:
    if rng.random() < 0.25:
        return rng.choice([damage_bytes, damage_text])(data, rng)
    tree, words = damage_tree(json.loads(data), rng, RAW_JSON)
    return dump_json(tree).encode("utf-8", "surrogatepass"), words


def damage_json_lines(data: bytes, rng: random.Random) -> Damaged:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number], words = damage_json(lines[number], rng)
    return b"\n".join(lines) + b"\n", f"line {number + 1}: {words}"


def damage_toml(data: bytes, rng: random.Random) -> Damaged:
    if rng.random() < 0.25:
        return rng.choice([damage_bytes, damage_text])(data, rng)
    tree, words = damage_tree(tomli.loads(data.decode()), rng, RAW_TOML)
    return dump_toml(tree).encode("utf-8", "replace"), words


def damage_python(data: bytes, rng: random.Random) -> Damaged:
    """A plugin's source that fails in a way of its own."""
    if rng.random() < 0.3:
        return rng.choice([damage_bytes, damage_text])(data, rng)
    line = rng.choice(
        [
            "raise SystemExit(7)",
            "raise RuntimeError('\\x1b[31mred\\n' + 'x' * 5000)",
            "import no_such_module_anywhere",
            "1 / 0",
            "(" * 300,
            "x = " + "-" * 3000 + "1",
            "from hyimg.hookspecs import nothing_of_this_name",
            "def f(:",
            "import sys; sys.exit()",
            "hyimg_no_such_hook = 1",
            "@hookimpl\ndef hyimg_no_such_hook(run):\n    pass",
            "@hookimpl\ndef hyimg_run_start(run, nothing):\n    pass",
            "@hookimpl\ndef hyimg_samplers():\n    return 3",
            "@hookimpl\ndef hyimg_losses():\n    return {'\\x1b[31m': 4, 5: None}",
            "raise type('\\x1b[31m', (Exception,), {})()",
        ]
    )
    return data + b"\n" + line.encode() + b"\n", f"python: {line[:40]}"


def damage_sqlite(data: bytes, rng: random.Random) -> Damaged:
    """A database of another schema, with other rows, or of another program."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.sqlite"
        path.write_bytes(data)
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = DELETE")
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        statement = _statement(connection, rng.choice(tables), rng) if tables else "CREATE TABLE other (a)"
        connection.execute(statement)
        connection.close()
        return path.read_bytes(), f"SQLite: {statement[:80]}"


def _statement(connection: Any, table: str, rng: random.Random) -> str:
    columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
    column = rng.choice(columns)
    value = rng.choice(
        [
            "NULL",
            "-1",
            "1e999",
            "9223372036854775807",
            "''",
            "x'00ff'",
            "char(27) || '[31m'",
            "zeroblob(2000000)",
            "'{'",
        ]
    )
    kind = rng.choice(
        ["update", "update", "update", "drop", "column", "rename", "version", "owner", "view", "trigger"]
    )
    if kind == "update":
        return f'UPDATE OR IGNORE "{table}" SET "{column}" = {value}'
    if kind == "drop":
        return f'DROP TABLE "{table}"'
    if kind == "column":
        return f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO "{rng.choice(["other", "x y", column + "2"])}"'
    if kind == "rename":
        return f'ALTER TABLE "{table}" RENAME TO "other"'
    if kind == "version":
        return f"PRAGMA user_version = {rng.choice([0, 1, 2, 99, -1, 2**31 - 1])}"
    if kind == "owner":
        return f"PRAGMA application_id = {rng.choice([0, 1, 252006673, -1])}"
    if kind == "view":
        return f'CREATE VIEW "v" AS SELECT * FROM "{table}", "{table}" AS b'
    return f'CREATE TRIGGER t AFTER INSERT ON "{table}" BEGIN DELETE FROM "{table}"; END'
