"""A state on disk: a folder of safetensors and JSON files, and a manifest that makes them one.

lora-step00000100-state/
  network-5be21c07.safetensors     one file for each part of the run that has tensors
  optimizer-5be21c07.safetensors
  state-5be21c07.json              everything else
  manifest.json                    the names, sizes and sha256 of those files

The manifest is written last and replaced atomically, and every save uses new file names. So a folder always holds
the complete state that its manifest names: while it is saved again, the old one until the new one is complete. A folder
without a manifest was never completed.

`pack` and `unpack` convert a `state_dict` to JSON and named tensors and back, without pickle.

    tree, tensors = pack(optimizer.state_dict())
    optimizer.load_state_dict(unpack(tree, tensors))

They accept any nesting of dictionaries (with plain keys), lists and tuples. Numbers, strings, None and enums are
restored exactly; a tensor that occurs several times is stored once, and shared again.
"""

from __future__ import annotations

import enum
import json
import math
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hyimg.cache.atomic import WriteError, atomic_write_text, explain_write, flush_folder
from hyimg.cache.hashing import file_identity
from hyimg.cache.own_files import is_link, list_folder, remove_file, remove_leftovers
from hyimg.checkpoints.safetensors_writer import write_tensors
from hyimg.config.documents import MAX_JSON_BYTES, parse_json, read_bounded
from hyimg.config.load import did_you_mean_file
from hyimg.errors import HyimgError, SystemLimitError, raise_system_limit
from hyimg.lora.files.conversion import output_tensor
from hyimg.training.metrics import LogPosition, cut_log

MANIFEST = "manifest.json"
FORMAT = 2
"""Format 2 has the metrics' length and checksum in its document, 1 a copy of all metrics in a file."""
METRICS = "metrics"
"""The document's key for the position of the metrics (`LogPosition`)."""
_READ_FORMATS = (1, FORMAT)
# As a save names them, but for the manifest
_SAVED_FILE = re.compile(r".+-[0-9a-f]{8}\.(safetensors|jsonl?)", re.DOTALL)
_OWN_FILE = re.compile(_SAVED_FILE.pattern + "|" + re.escape(MANIFEST), re.DOTALL)
_METRICS_BYTES = 2_000_000_000
"""The maximum size of the metrics in a state of format 1."""
_STATE, _METRICS = "state.json", "metrics.jsonl"


class DamagedStateError(HyimgError):
    """A folder that is not a complete state."""


@dataclass(frozen=True)
class SavedState:
    """A complete state. `document` is the one that `write_state` was given."""

    path: Path
    document: Mapping[str, Any]
    files: Mapping[str, Path]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part, on the CPU; empty if it has none."""
        path = self.files.get(f"{part}.safetensors")
        try:
            return load_file(path) if path is not None else {}
        except (OSError, SafetensorError) as error:
            raise_system_limit(error)
            raise DamagedStateError(f"`{path}` cannot be read: {error}") from error

    @property
    def metrics(self) -> str | None:
        """The metrics up to this state, in states of format 1; later ones have their position in a log."""
        file = self.files.get(_METRICS)
        try:
            return read_bounded(file, _METRICS_BYTES).decode() if file is not None else None
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedStateError(f"`{file}` cannot be read: {error}") from error

    def restore_log(self, path: Path) -> str | None:
        """Restores the metrics up to this state in `path`; returns a warning if their lines are missing.

        Raises as `cut_log`, and DamagedStateError.
        """
        if (text := self.metrics) is not None:
            atomic_write_text(path, text, root=path.parent)
            return None
        try:
            name, num_bytes, sha256 = self.document[METRICS]
            position = LogPosition(Path(str(name)).name, int(num_bytes), str(sha256))
            step = int(self.document["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStateError(f"`{self.path}` does not say how long its metrics are") from error
        return cut_log(path, position, step=step, folder=self.path.parent)


def write_state(
    path: Path, document: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], *, root: Path
) -> None:
    """Writes a state to the folder `path`; an existing one is replaced once the new one is complete. Links below `root`
    are not followed.

    `tensors` holds the tensors of each part; `document` has the step and, as `METRICS`, the log's position. Raises
    HyimgError or RunError if it cannot be written; an existing state is kept then.
    """
    token = secrets.token_hex(4)
    entries: dict[str, dict[str, object]] = {}

    def file_of(name: str) -> Path:
        return path / f"{Path(name).stem}-{token}{Path(name).suffix}"

    try:
        for part, of_part in tensors.items():
            if of_part:
                file = file_of(f"{part}.safetensors")
                write_tensors(file, [output_tensor(n, t) for n, t in of_part.items()], None, root=root)
                entries[f"{part}.safetensors"] = _entry(file)
        atomic_write_text(file_of(_STATE), json.dumps(document, allow_nan=False), root=root)
        entries[_STATE] = _entry(file_of(_STATE))
        manifest = json.dumps({"format": FORMAT, "files": entries}, indent=1)
        for entry in entries.values():
            (path / str(entry["file"])).stat()
        atomic_write_text(path / MANIFEST, manifest, root=root)
    except BaseException as error:
        with suppress(OSError, HyimgError):
            _remove_files(path, root, lambda name: token in name)
            path.rmdir()  # fails, as it should, if it contains an older state
        if isinstance(error, FileNotFoundError):
            raise WriteError(f"`{path}` was removed while it was written") from error
        if isinstance(error, OSError):
            raise explain_write(error, path, path) from error
        raise
    flush_folder(path.parent)
    tidy_state(path, root=root)


def is_whole_state(path: Path) -> bool:
    """Whether a state has its manifest, which is written last. The files that it names are not checked."""
    return not is_link(path) and (path / MANIFEST).is_file()


def tidy_state(path: Path, *, root: Path) -> None:
    """Removes files of saves other than the manifest's, and a state that was never completed.

    Other files stay, and so does what cannot be removed.
    """
    remove_leftovers(path, lambda stem: _OWN_FILE.fullmatch(stem) is not None, root=root)
    with suppress(OSError, HyimgError):
        if not is_whole_state(path):
            _remove_files(path, root, lambda name: True)
            path.rmdir()
            return
    with suppress(OSError, HyimgError, KeyError, TypeError, AttributeError):
        manifest = _read_json(path / MANIFEST)
        named = {entry["file"] for entry in manifest["files"].values()}
        _remove_files(path, root, lambda name: name not in named)


def read_state(path: Path, *, verify: bool = True) -> SavedState:
    """Opens a state and verifies its files against the manifest; tensors are read on access.

    Without `verify` only the document is verified, which suffices to list states.

    Raises DamagedStateError, with the reason, if the folder is not a complete state.
    """
    if path.is_file():
        raise DamagedStateError(f"`{path}` is a file, but a state is a folder", hint=_folder_hint(path))
    try:
        manifest = _read_json(path / MANIFEST)
        number, entries = manifest["format"], manifest["files"]
        files = {name: path / Path(entry["file"]).name for name, entry in entries.items()}
        if number in _READ_FORMATS:
            for name in files if verify else (_STATE,):
                _compare(files[name], entries[name]["bytes"], entries[name]["sha256"])
            if number < FORMAT:
                files[_METRICS]  # raises where the manifest does not name it
            document = _read_json(files[_STATE])
    except FileNotFoundError as error:
        if not path.is_dir():
            guess = did_you_mean_file(path)
            raise DamagedStateError(
                f"there is no state `{path}`", hint=guess or "give its folder, or `latest`"
            ) from error
        lacks = Path(str(error.filename)).name
        why = " (the run ended while saving, or another program made it)" if lacks == MANIFEST else ""
        raise DamagedStateError(
            f"`{path}` is not a complete state: `{lacks}` is missing{why}",
            hint="give a folder whose name ends in `-state`, or `latest`",
        ) from error
    except OSError as error:
        raise_system_limit(error)
        raise DamagedStateError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except (DamagedStateError, SystemLimitError):
        raise
    except HyimgError as error:
        raise DamagedStateError(f"`{path}` is not a complete state: {error.message}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStateError(f"`{path}` is not a complete state: `{MANIFEST}` is damaged") from error
    if number not in _READ_FORMATS:
        raise DamagedStateError(
            f"`{path}` has format {number}, but this release reads {FORMAT}",
            hint="resume with the release that saved it",
        )
    return SavedState(path, document, files)


def _read_json(path: Path) -> Any:
    return parse_json(read_bounded(path, MAX_JSON_BYTES), f"`{path.name}`")


def _folder_hint(file: Path) -> str:
    """What to give instead of a file: the state that it is part of, or that of a LoRA file."""
    states = [folder / f"{file.stem}-state" for folder in (file.parent, file.parent.parent)]
    for folder in (file.parent, *states):
        if (folder / MANIFEST).is_file():
            return f"give the state's folder: `{folder}`"
    hint = "give a folder whose name ends in `-state`, or `latest`"
    return hint + ("; `--network_weights` starts from a LoRA file" if file.suffix == ".safetensors" else "")


def _entry(file: Path) -> dict[str, object]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_identity(file)}


def _compare(file: Path, num_bytes: int, sha256: str) -> None:
    size = file.stat().st_size
    if size != num_bytes:
        raise DamagedStateError(
            f"`{file.parent}` is not a complete state: `{file.name}` has {size} bytes and should have {num_bytes}"
        )
    try:
        found = file_identity(file)
    except HyimgError as error:
        raise_system_limit(error)
        raise DamagedStateError(f"`{file.parent}` is not a complete state: {error.message}") from error
    if found != sha256:
        raise DamagedStateError(
            f"`{file.parent}` is not a complete state: `{file.name}` is damaged (wrong sha256)"
        )


def _remove_files(folder: Path, root: Path, which: Callable[[str], bool]) -> None:
    """Removes the files of saves that `which` selects by name."""
    for entry in list_folder(folder, root=root):
        if _SAVED_FILE.fullmatch(entry.name) and which(entry.name):
            remove_file(entry.path, root=root)


# Values without a JSON form are objects with one key that names their type
_TENSOR, _TUPLE, _DICT, _FLOAT, _ENUM, _DTYPE = "$tensor", "$tuple", "$dict", "$float", "$enum", "$dtype"
_PREFIX = "$"


def pack(value: object) -> tuple[Any, dict[str, Tensor]]:
    """(what `json.dumps` takes, tensors by the path to each), the tensors detached and not copied.

    Raises HyimgError, naming the place, for values that are neither data nor dense tensors.
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
            f"a state cannot contain `{path}`, which is a {type(value).__name__}",
            hint="use numbers, strings, tensors, and lists, tuples and dictionaries of these",
        )

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        items = [(key, self.tree(item, _join(path, key))) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith(_PREFIX) for key in value):
            return dict(items)
        return {_DICT: [[self.tree(key, _join(path, key)), item] for key, item in items]}

    def _keep(self, tensor: Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise HyimgError(f"a state cannot contain `{path}`, which is not a dense tensor")
        if (name := self._names.get(id(tensor))) is None:
            name = path
            while name in self.tensors:  # {"a": {"b": ...}} next to {"a.b": ...}
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
        raise ValueError(f"`{module}.{name}` is not an enum")
    return kind[member]


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r} is not a {kind.__name__}")
    return value


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
