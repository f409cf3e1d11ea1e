"""Reading a run file: its keys with tables flattened, and whether a run wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyimg.config.command_table import options_of_all_commands
from hyimg.config.dataset_options import DATASET_FLAGS, DATASET_PATHS
from hyimg.config.documents import DOCUMENT_BYTES, parse_document, read_text
from hyimg.errors import HyimgError, raise_system_limit

RESOLVED_MARK = "# every option of a run, as hyimg resolved it"
"""The first line of a run file that a run wrote, with all its options: those at their defaults were not given."""
SAVES_TABLE = "saves"
"""The table of such a file that lists what the run has saved, under `SAVES_KEYS`; it holds no options."""
SAVES_KEYS = frozenset({"done", "begun"})


def existing_run_file(run_file: Path) -> Path:
    """The file, or the one with `.toml` appended, as the reference tool does."""
    with_suffix = run_file.parent / f"{run_file.name}.toml"  # `.` has no name to change
    return with_suffix if not run_file.exists() and with_suffix.is_file() else run_file


def read_run_file(path: Path) -> dict[str, Any]:
    """The keys of a TOML run file; tables are only headings, and flattened.

    Raises HyimgError if the file is missing, invalid, of another kind, or gives a key twice.
    """
    try:
        text = read_text(path, DOCUMENT_BYTES)
    except OSError as error:
        raise HyimgError(
            f"cannot read the run file `{path}`: {error.strerror}",
            hint="give `--config` an existing TOML file",
        ) from error
    except UnicodeDecodeError as error:
        raise HyimgError(f"the run file `{path}` is not UTF-8 (byte {error.start})") from error
    document = parse_document(text, path, "run file", path_keys=_path_keys())
    if not isinstance(document, Mapping):
        raise HyimgError(f"the run file `{path}` is not a table of options")
    keys: dict[str, Any] = {}
    saves = document.get(SAVES_TABLE)
    is_list = isinstance(saves, Mapping) and saves.keys() <= SAVES_KEYS
    _flatten({key: value for key, value in document.items() if key != SAVES_TABLE or not is_list}, keys, path)
    return keys


def is_resolved(path: Path) -> bool:
    """Whether a run wrote the file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.readline().startswith(RESOLVED_MARK)
    except (OSError, UnicodeDecodeError) as error:
        raise_system_limit(error)
        return False


def _path_keys() -> frozenset[str]:
    """The keys of run files whose values are paths, for any command, and those of the reference tool."""
    options = options_of_all_commands()
    names = {name for opt in options if opt.kind == "path" or opt.text == "path" for name in opt.names}
    return frozenset(names | {name for name, flag in DATASET_FLAGS.items() if flag.key in DATASET_PATHS})


def _flatten(table: Mapping[str, Any], into: dict[str, Any], path: Path) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            _flatten(value, into, path)
        elif key.replace("-", "_") in into:
            raise HyimgError(f"the run file `{path}` gives `{key}` twice", hint="keep one of the two")
        else:
            into[key.replace("-", "_")] = value
