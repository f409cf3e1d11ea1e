"""`NAME.run.toml`: the resolved options of a run, to repeat and resume it, and the list of its saves; and the files of
an earlier run that is being replaced.

Those are moved below `.NAME.replaced`, under the same path within their folder, until the new run has saved something.
A mark, written last, says that all are there. No link below the user's folders is followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from hyimg.cache.atomic import atomic_write_bytes
from hyimg.cache.own_files import (
    is_link,
    remove_file,
    remove_tree,
    rename,
    temporary_of,
    walk_files,
)
from hyimg.config.documents import DOCUMENT_BYTES, parse_toml, read_bounded
from hyimg.config.load import flatten
from hyimg.config.run_file import RESOLVED_MARK, SAVES_TABLE
from hyimg.errors import HyimgError

# Options that say how a command was given, not what the run is
_NOT_REPEATED = ("config", "output_config", "overwrite", "resume", "resume_force", "resume_from_huggingface")
_SAVES_MARK = f"\n# what the run has saved; only this is replaced or removed\n[{SAVES_TABLE}]\n"


class Saves(NamedTuple):
    """What a run has saved, by the names that LoRA files and states have without their endings.

    `begun` is the last file or state of a save that may be incomplete, say `NAME-step00000100-state`.
    """

    done: tuple[str, ...] = ()
    begun: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """All of them, complete or not."""
        return frozenset({*self.done, *([] if self.begun is None else [self.begun.removesuffix("-state")])})


def config_toml(config: object, *, comment: str = "") -> str:
    """All options of a config as a TOML run file, paths absolute, without those that are None or empty.

    `comment` is a line below the first, by which `hyimg.config.run_file` knows that a run wrote the file.
    """
    values = {}
    for key, value in flatten(config).items():
        if value is None or value == () or key in _NOT_REPEATED:
            continue
        values[key] = plain(value)
    top = f"{RESOLVED_MARK}\n" + (f"# {comment}\n" if comment else "")
    return f"{top}{tomli_w.dumps(values, multiline_strings=True)}"


def read_saves(path: Path) -> Saves | None:
    """What a run file lists; None where there is none that can be read, or an earlier release wrote it."""
    try:
        return _split(read_bounded(path, DOCUMENT_BYTES).decode())[1]
    except (OSError, UnicodeDecodeError):
        return None


def with_saves(text: str, saves: Saves) -> str:
    """The text of a run file with that list, in place of the one that it has."""
    values: dict[str, object] = {"done": sorted(set(saves.done))}
    if saves.begun is not None:
        values["begun"] = saves.begun
    return _split(text)[0] + _SAVES_MARK + tomli_w.dumps(values)


def _split(text: str) -> tuple[str, Saves | None]:
    """The options of a run file, and its list where it has one."""
    options, mark, table = text.rpartition(_SAVES_MARK)
    if mark:
        with suppress(HyimgError):
            values = parse_toml(table, "the list of what was saved")
            done, begun = values.get("done"), values.get("begun")
            if isinstance(done, list) and isinstance(begun, str | None):
                return options, Saves(tuple(name for name in done if isinstance(name, str)), begun)
    return text, None


def plain(value: object) -> Any:
    """An option's value as TOML and JSON have it."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


# In the folder of files that are set aside, once all of them are
_ALL = "all"


class ReplacedRun:
    """What is set aside of the run `name` in `roots`: the run folder, and those with its states."""

    def __init__(self, name: str, roots: Sequence[Path]) -> None:
        self._folder_name = f".{name}.replaced"
        self._roots = roots

    @property
    def folder_name(self) -> str:
        """The name of the folder that takes the files, in each root."""
        return self._folder_name

    def set_aside(self, files: Iterable[Path]) -> None:
        """Moves files and states away, each within its root; the mark comes last."""
        moved = False
        for path in files:
            root = max((r for r in self._roots if path.is_relative_to(r)), key=lambda r: len(r.parts))
            self._move(path, root / self._folder_name / path.relative_to(root), root)
            moved = True
        if moved:
            atomic_write_bytes(self._mark, b"", root=self._roots[0])

    def put_back(self, *, replaced: bool) -> None:
        """Restores the files, or removes them where all were set aside and the run that has `replaced` them saved.

        Without the mark a run was killed while it moved them, in either direction: what lies in the folder is
        then the earlier run's too.
        """
        asides = [(root, root / self._folder_name) for root in self._roots]
        asides = [(root, aside) for root, aside in asides if aside.is_dir() and not is_link(aside)]
        if not asides:
            return
        if replaced and self._is_whole:
            self.discard()
            return
        if self._is_whole:
            remove_file(self._mark, root=self._roots[0])
        for root, aside in asides:
            for path in list(walk_files(aside, root=root)):
                if path.parent == aside and temporary_of(path.name) == _ALL:
                    continue  # of a mark that a kill kept from being written, so no file of the earlier run
                self._move(path, root / path.relative_to(aside), root)
            remove_tree(aside, root=root)

    def discard(self) -> None:
        """Removes what is set aside; a kill on the way leaves nothing that could be put back.

        The run folder, which has the mark, comes last.
        """
        for root in self._roots[::-1]:
            aside = root / self._folder_name
            if aside.is_dir() and not is_link(aside):
                remove_tree(aside, root=root)

    @property
    def _mark(self) -> Path:
        return self._roots[0] / self._folder_name / _ALL

    @property
    def _is_whole(self) -> bool:
        return not is_link(self._mark.parent) and self._mark.is_file()

    @staticmethod
    def _move(path: Path, target: Path, root: Path) -> None:
        rename(path, target, root=root)
