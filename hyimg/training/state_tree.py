"""A `state_dict` as JSON and named tensors, and back: what keeps a state free of pickle.

    tree, tensors = pack(optimizer.state_dict())
    optimizer.load_state_dict(unpack(tree, tensors))

Any nesting of dictionaries (keys of any plain kind), lists and tuples is walked. Numbers, texts, None and
enums keep their type and every bit; a tensor that stands in several places is kept once and stands in them
all again.
"""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyimg.errors import HyimgError

# What JSON has no form for is an object with one key, which says what it is
_TENSOR, _TUPLE, _DICT, _FLOAT, _ENUM, _DTYPE = "$tensor", "$tuple", "$dict", "$float", "$enum", "$dtype"
_PREFIX = "$"


def pack(value: object) -> tuple[Any, dict[str, Tensor]]:
    """(what `json.dumps` takes, tensors by the path to each), the tensors detached and not copied.

    Raises HyimgError where something stands in it that is neither data nor a dense tensor, naming the place.
    """
    packer = _Packer()
    return packer.tree(value, ""), packer.tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`. Raises ValueError or KeyError for a tree that `pack` does not make."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((kind, content),) = tree.items()
        if kind.startswith(_PREFIX):
            return _special(kind, content, tensors)
    return {key: unpack(item, tensors) for key, item in tree.items()}


def equal(first: Any, second: Any) -> bool:
    """Whether two states hold the same values in the same places, tensors bit for bit."""
    tree, tensors = pack(first)
    other_tree, others = pack(second)
    return (
        tree == other_tree
        and tensors.keys() == others.keys()
        and all(_same_bits(tensor, others[name]) for name, tensor in tensors.items())
    )


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def tree(self, value: object, path: str) -> Any:
        if isinstance(value, Tensor):
            return {_TENSOR: self._keep(value, path)}
        if isinstance(value, enum.Enum):
            kind = type(value)
            return {_ENUM: [kind.__module__, kind.__qualname__, value.name]}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {_FLOAT: repr(float(value))}
        if isinstance(value, torch.dtype):
            return {_DTYPE: str(value).removeprefix("torch.")}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, (list, tuple)):
            items = [self.tree(item, _join(path, place)) for place, item in enumerate(value)]
            return items if isinstance(value, list) else {_TUPLE: items}
        raise HyimgError(
            f"a state cannot hold `{path}`, which is a {type(value).__name__}",
            hint="it takes numbers, texts, tensors, and lists, tuples and dictionaries of them",
        )

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        items = [(key, self.tree(item, _join(path, key))) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith(_PREFIX) for key in value):
            return dict(items)
        return {_DICT: [[self.tree(key, _join(path, key)), item] for key, item in items]}

    def _keep(self, tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise HyimgError(f"a state cannot hold `{path}`, which is a tensor that is not dense")
        if (name := self._names.get(id(tensor))) is None:
            name = path
            while name in self.tensors:  # {"a": {"b": ...}} beside {"a.b": ...}
                name += "'"
            self._names[id(tensor)] = name
            self.tensors[name] = tensor.detach()
        return name


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _special(kind: str, content: Any, tensors: Mapping[str, Tensor]) -> Any:
    if kind == _TENSOR:
        return tensors[content]
    if kind == _TUPLE:
        return tuple(unpack(item, tensors) for item in content)
    if kind == _DICT:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    if kind == _FLOAT:
        return float(content)
    if kind == _DTYPE:
        return _of_type(getattr(torch, content), torch.dtype)
    if kind == _ENUM:
        return _enum_member(*content)
    raise ValueError(f"`{kind}` is unknown")


def _enum_member(module: str, name: str, member: str) -> enum.Enum:
    # only from a module that is imported already: a file must not decide what code runs
    kind: Any = sys.modules[module]
    for part in name.split("."):
        kind = getattr(kind, part)
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise ValueError(f"`{module}.{name}` is no enum")
    return kind[member]


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
