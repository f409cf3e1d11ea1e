"""Damage to safetensors files: their length, header, layout, values and metadata."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

from tests.robustness.mutations import (
    NASTY_TEXTS,
    RAW_JSON,
    Damaged,
    Raw,
    Twice,
    damage_bytes,
    damage_tree,
    dump_json,
)

_HEADER_RAW = ('{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}', *RAW_JSON)
_DTYPES = (
    "F32",
    "F64",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "F4",
    "U64",
    "",
    "f32",
)


def damage_safetensors(data: bytes, rng: random.Random) -> Damaged:
    """Damage to the length, the header, the layout, the values, or the metadata of a safetensors file."""
    if rng.random() < 0.15:
        return damage_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = rng.choice(
        ["length", "header", "tensor", "tensor", "layout", "layout", "values", "metadata", "metadata"]
    )
    if kind == "length":
        length = rng.choice([0, 1, size - 1, size + 1, size + len(body), 2**31, 2**63, 2**64 - 1, 99_999_999])
        return struct.pack("<Q", length) + data[8:], f"safetensors: header of {length} bytes"
    if kind == "header":
        tree, words = damage_tree(header, rng, _HEADER_RAW)
        return _packed(dump_json(tree), body), f"safetensors header: {words}"
    if kind == "metadata":
        words = _damage_metadata(header, rng)
        return _packed(dump_json(header), body), f"safetensors metadata: {words}"
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if kind == "values":
        changed = bytearray(body)
        start, end = header[name]["data_offsets"]
        fill = rng.choice([b"\xff", b"\x00", b"\x7f\x80", b"\x00\x00\x80\x7f", b"\x00\x7e", b"\xff\x7f"])
        changed[start:end] = (fill * (end - start))[: end - start]
        return _packed(json.dumps(header), bytes(changed)), f"safetensors: {name} filled with {fill.hex()}"
    if kind == "layout":
        words = _damage_layout(header, name, rng)
        return _packed(dump_json(header), body), f"safetensors layout: {name} {words}"
    return _damage_tensor(header, body, name, rng)


def _packed(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def _damage_layout(header: dict[str, Any], name: str, rng: random.Random) -> str:
    """Changes what the header says of a tensor, the bytes staying as they are."""
    entry = header[name]
    kind = rng.choice(["dtype", "shape", "offsets", "offsets", "swap", "duplicate"])
    if kind == "dtype":
        entry["dtype"] = rng.choice(_DTYPES)
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            [shape[::-1], [1, *shape], [*shape, 1], shape[:-1], [], [0, *shape], [-1, *shape], [1] * 70,
             [1] * 70 + shape, [2**32, 2**32], [2**62, 4],
             [1.5], ["1"], [True], [math.prod(shape)], [1] * 5000, None, {}]
        )  # fmt: skip
    elif kind == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[0, end], [start, end + 4], [end, start], [-4, end], [start, end, end], [start], [], [0, 2**63],
             [2**64, 2**65], [start + 1, end + 1], [str(start), str(end)], [float(start), end], None, [True, end],
             [0, 0]]
        )  # fmt: skip
    elif kind == "swap":
        other = rng.choice([one for one in header if one != "__metadata__"])
        entry["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            entry["data_offsets"],
        )
    else:
        header[name] = Twice(entry, {**entry, "shape": [*entry["shape"], 1]})
    return f"{kind} {str(header.get(name))[:60]}"


def _damage_tensor(header: dict[str, Any], body: bytes, name: str, rng: random.Random) -> Damaged:
    """A well-formed file whose tensors are not those that a reader expects."""
    metadata = header.pop("__metadata__", None)
    tensors = {
        key: (info["dtype"], info["shape"], body[slice(*info["data_offsets"])])
        for key, info in header.items()
    }
    dtype, shape, values = tensors[name]
    kind = rng.choice(
        ["drop", "rename", "shape", "dtype", "scalar", "empty", "add", "alpha", "half", "only", "dims"]
    )
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        del tensors[name]
        stem = name.rpartition(".")[0]
        new = rng.choice(
            [*NASTY_TEXTS, name.upper(), f"{name}.weight", f"{stem}.alpha", name.replace("0", "9" * 30)]
        )
        tensors[new] = (dtype, shape, values)
    elif kind == "shape":
        tensors[name] = (
            dtype,
            rng.choice([shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1, 1]]),
            values,
        )
    elif kind == "dtype":
        width = max(1, len(values) // max(1, math.prod(shape)))
        same = {
            1: ["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"],
            2: ["F16", "BF16", "I16"],
            4: ["F32", "I32", "C64"],
        }
        tensors[name] = (rng.choice(same.get(width, ["F64"])), shape, values)
    elif kind == "scalar":
        tensors[name] = ("F32", [], struct.pack("<f", rng.choice([0.0, math.nan, math.inf, 1e38, -1.0])))
    elif kind == "empty":
        tensors[name] = (dtype, rng.choice([[0], [0, *shape[1:]], [*shape[:-1], 0]]), b"")
    elif kind == "dims":
        tensors[name] = (dtype, [1] * rng.choice([5, 64, 70, 2000]) + shape, values)
    elif kind == "half":
        rows = shape[0] // 2 if shape else 0
        tensors[name] = (
            dtype,
            [rows, *shape[1:]],
            values[: len(values) // max(1, shape[0]) * rows] if shape else b"",
        )
    elif kind == "only":
        tensors = {name: tensors[name]}
    else:
        added = (
            f"{name.rpartition('.')[0]}.alpha" if kind == "alpha" else rng.choice([*NASTY_TEXTS, "x" * 300])
        )
        value = rng.choice([0.0, -1.0, math.nan, math.inf, 1e-45, 3.4e38])
        tensors[added] = ("F32", rng.choice([[], [1], [1] * 70, [1, 1]]), struct.pack("<f", value))
    return _written(tensors, metadata), f"safetensors: {kind} {name[:60]}"


def _written(tensors: dict[str, tuple[str, list[int], bytes]], metadata: object) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(values)]}
        body += values
    return _packed(json.dumps(header), body)


def _damage_metadata(header: dict[str, Any], rng: random.Random) -> str:
    """The metadata are texts, some of which hold JSON: that is where readers look inside."""
    metadata = header.setdefault("__metadata__", {})
    names = [
        *metadata,
        "ss_network_args",
        "ss_tag_frequency",
        "lora_adapter_metadata",
        "_quantization_metadata",
    ]
    name = rng.choice(names)
    old = metadata.get(name, "{}")
    new: Any = rng.choice(
        [
            *NASTY_TEXTS,
            *RAW_JSON[:9],
            '"\\ud800"',
            {},
            [],
            3,
            None,
            Raw("1e400"),
            Raw('"\\ud800"'),
            Raw(RAW_JSON[8]),
        ]
    )
    with_json = None
    if isinstance(old, str) and old[:1] in ("{", "[") and rng.random() < 0.7:
        tree, with_json = damage_tree(json.loads(old), rng, RAW_JSON)
        new = dump_json(tree)
    metadata[name] = new
    return f"{name} {with_json or str(new)[:30]!r}"
