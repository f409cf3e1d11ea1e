"""A state on disk: a folder of safetensors and JSON files, and a manifest that makes them one.

lora-step00000100-state/
  network-5be21c07.safetensors     one file for each part of the run that has tensors
  optimizer-5be21c07.safetensors
  state-5be21c07.json              everything else
  metrics-5be21c07.jsonl           the metrics so far
  manifest.json                    the names, sizes and sha256 of those files

The manifest is written last and replaced in one piece, and the files of every save have names of their own.
So a folder is at any moment the state that its manifest names, whole: when it is saved again, the old one up
to the instant in which the new one is complete. A folder without a manifest was never finished.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyimg.cache.atomic import atomic_path, atomic_write_text, flush_folder, temporary_name
from hyimg.cache.identity import file_identity
from hyimg.errors import HyimgError

MANIFEST = "manifest.json"
FORMAT = 1
_STATE, _METRICS = "state.json", "metrics.jsonl"


class DamagedStateError(HyimgError):
    """A folder that holds no whole state."""


@dataclass(frozen=True)
class SavedState:
    """A state that was found whole. `document` is what `write_state` was given."""

    path: Path
    document: Mapping[str, Any]
    files: Mapping[str, Path]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part, on the CPU; none where it has none."""
        path = self.files.get(f"{part}.safetensors")
        try:
            return load_file(path) if path is not None else {}
        except (OSError, SafetensorError) as error:
            raise DamagedStateError(f"`{path}` cannot be read: {error}") from error

    def metrics(self) -> str:
        """The lines of the metrics up to this state."""
        return self.files[_METRICS].read_text(encoding="utf-8")


def write_state(
    path: Path, document: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], metrics: str
) -> None:
    """Makes `path` the folder of this state; one that is there is replaced when the new one is whole.

    `tensors` holds the tensors of each part. Raises HyimgError or RunError where it cannot be written; what
    was there before stays then.
    """
    writers: dict[str, Callable[[Path], object]] = {
        f"{part}.safetensors": _TensorWriter(of_part) for part, of_part in tensors.items() if of_part
    }
    writers[_METRICS] = lambda file: file.write_text(metrics, encoding="utf-8")
    text = json.dumps(document, allow_nan=False)
    writers[_STATE] = lambda file: file.write_text(text, encoding="utf-8")
    token = secrets.token_hex(4)
    entries: dict[str, dict[str, object]] = {}
    try:
        for name, write in writers.items():
            file = path / f"{Path(name).stem}-{token}{Path(name).suffix}"
            with atomic_path(file) as temporary:
                write(temporary)
            entries[name] = {"file": file.name, "bytes": file.stat().st_size, "sha256": file_identity(file)}
        atomic_write_text(path / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=1))
    except BaseException:
        _remove_files(path, lambda file: token in file.name)
        with suppress(OSError):
            path.rmdir()  # which fails, as it should, where an older state is in it
        raise
    flush_folder(path.parent)
    named = {MANIFEST, *(str(entry["file"]) for entry in entries.values())}
    _remove_files(path, lambda file: file.name not in named)


def read_state(path: Path, *, verify: bool = True) -> SavedState:
    """Reads a state and compares every file of it with the manifest; tensors are read when they are asked for.

    Without `verify` only the document is, for a look at what there is.

    Raises DamagedStateError where the folder is not a whole state, with the reason.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        number, entries = manifest["format"], manifest["files"]
        files = {name: path / Path(entry["file"]).name for name, entry in entries.items()}
        if number == FORMAT:
            for name in files if verify else (_STATE,):
                _compare(files[name], entries[name]["bytes"], entries[name]["sha256"])
            document = json.loads(files[_STATE].read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not path.is_dir():
            raise DamagedStateError(
                f"there is no state `{path}`", hint="give its folder, or `latest`"
            ) from error
        lacks = Path(str(error.filename)).name
        why = " (the run ended while it was saved, or another program made it)" if lacks == MANIFEST else ""
        raise DamagedStateError(
            f"`{path}` is no whole state: `{lacks}` is missing{why}",
            hint="give a folder whose name ends in `-state`, or `latest`",
        ) from error
    except OSError as error:
        raise DamagedStateError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStateError(f"`{path}` is no whole state: its JSON is damaged") from error
    if number != FORMAT:
        raise DamagedStateError(
            f"`{path}` has the format {number}, and this release reads {FORMAT}",
            hint="resume with the release that saved it",
        )
    return SavedState(path, document, files)


def remove_state(path: Path) -> None:
    """Removes a state's folder; it is no state from the first moment on."""
    going = path.with_name(temporary_name(path.name))
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


@dataclass(frozen=True)
class _TensorWriter:
    tensors: Mapping[str, Tensor]

    def __call__(self, file: Path) -> None:
        # copies, since safetensors refuses tensors that share memory
        save_file({n: t.detach().to("cpu", copy=True).contiguous() for n, t in self.tensors.items()}, file)


def _compare(file: Path, num_bytes: int, sha256: str) -> None:
    size = file.stat().st_size
    if size != num_bytes:
        raise DamagedStateError(
            f"`{file.parent}` is no whole state: `{file.name}` has {size} bytes and should have {num_bytes}"
        )
    try:
        found = file_identity(file)
    except HyimgError as error:
        raise DamagedStateError(f"`{file.parent}` is no whole state: {error.message}") from error
    if found != sha256:
        raise DamagedStateError(
            f"`{file.parent}` is no whole state: `{file.name}` is damaged (its sha256 is another)"
        )


def _remove_files(folder: Path, which: Callable[[Path], bool]) -> None:
    with suppress(OSError):
        for file in list(folder.iterdir()):
            if which(file):
                file.unlink(missing_ok=True)
