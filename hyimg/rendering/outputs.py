"""What an `infer` that was stopped has done, so that the same command continues it.

Next to its results a run keeps a hidden folder, named by a hash of everything that they are made with: the seeds that
it drew, the latents that are not decoded yet, and which results are complete. It is removed once all are. A command
that differs in a prompt, a setting, a LoRA's content or a model file has another folder, so nothing stale is kept.

Where `infer` puts its results: `--save_path` as a file, as numbered files, or as a folder that is filled up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from hyimg import __version__
from hyimg.cache.atomic import (
    FileIsThereError,
    atomic_write_bytes,
    atomic_write_text,
    require_file_name,
    require_writable_folder,
    sole_process,
)
from hyimg.cache.own_files import (
    is_link,
    is_own_folder,
    list_folder,
    open_to_append,
    remove_file,
    remove_leftovers,
    temporary_stem,
)
from hyimg.checkpoints.architecture import VAEArch
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.config.documents import MAX_JSON_BYTES, parse_json, read_bounded, read_text
from hyimg.config.option import MAX_SEED
from hyimg.config.rendering import InferOutput
from hyimg.errors import HyimgError, RunError, raise_system_limit
from hyimg.rendering.decoding import Rendered, as_recorded, read_latent, settings_text, write_latent
from hyimg.report import Reporter, count_text

PNG, LATENT = ".png", ".safetensors"

SUFFIXES = {"images": (PNG,), "latent": (LATENT,), "latent_images": (LATENT, PNG)}
"""What each `--output_type` leaves."""

_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
_NUMBERED = re.compile(r"(\d{4,})\.(?:png|safetensors)", re.IGNORECASE)

ResultFiles = dict[str, Path]
"""The files of one result by suffix."""


def result_files(
    output: InferOutput, count: int, *, first: int | None = None, may_exist: Sequence[bool] = ()
) -> list[ResultFiles]:
    """The files of each of `count` results; their folder is tried, so that a render is not lost at its end.

    A folder is filled up from the number `first`, by default after the highest number in it; a file is replaced with
    `--overwrite` only, unless it is of a result that `may_exist`. Raises HyimgError for a folder that cannot be
    written, and for files that are there.
    """
    save_path = output.save_path
    assert save_path is not None
    suffixes = SUFFIXES[output.output_type]
    if is_folder(save_path):
        require_writable_folder(save_path)
        first = first_free_number(save_path) if first is None else first
        return [
            {suffix: save_path / f"{number:04}{suffix}" for suffix in suffixes}
            for number in range(first, first + count)
        ]
    if save_path.suffix.lower() in _OTHER_PICTURES:
        raise HyimgError(f"`--save_path` `{save_path}`: pictures are saved as PNG", hint="name a `.png` file")
    require_writable_folder(save_path.parent)
    endings = [""] if count == 1 else [f"-{number:04}" for number in range(1, count + 1)]
    results = [{suffix: _beside(save_path, end, suffix) for suffix in suffixes} for end in endings]
    for path in (path for files in results for path in files.values()):
        require_file_name(path)
    new = [files for files, may in zip(results, may_exist or [False] * count, strict=True) if not may]
    there = [path for files in new for path in files.values() if path.exists()]
    if there and not output.overwrite:
        raise _is_there(there[0])
    return results


def write_result(
    output: InferOutput, files: ResultFiles, suffix: str, data: bytes, *, may_be_own: bool = False
) -> Path:
    """Writes one of the files of a result and gives its path.

    Where another run has taken the number in the folder meanwhile, `files` become those of the next one. With
    `may_be_own`, a file that is there with the same content is the result, from a run that was stopped before it could
    record it. Raises RunError where another file has the name that `--save_path` says.
    """
    assert output.save_path is not None
    in_folder = is_folder(output.save_path)
    while True:
        path = files[suffix]
        try:
            verify = read_header if suffix == LATENT else None
            replace = output.overwrite and not in_folder
            root = _root(output.save_path, path)
            atomic_write_bytes(path, data, root=root, replace=replace, verify=verify)
        except FileIsThereError:
            if may_be_own and _holds(path, data):
                return path
            if not in_folder:
                raise RunError(*_is_there(path).args, hint=_is_there(path).hint) from None
            files.update(result_files(output, 1)[0])
        else:
            return path


def _holds(path: Path, data: bytes) -> bool:
    return (
        not is_link(path)
        and path.is_file()
        and path.stat().st_size == len(data)
        and path.read_bytes() == data
    )


def _is_there(path: Path) -> HyimgError:
    return HyimgError(f"`{path}` exists", hint="name another `--save_path`, or give `--overwrite`")


def first_free_number(folder: Path) -> int:
    """The number after the highest of the results that are in a folder."""
    return 1 + max(_numbers(folder), default=0)


def _root(save_path: Path, path: Path) -> Path | None:
    """The folder below which no link is followed; None for the very file that the user named."""
    if is_folder(save_path):
        return save_path
    return None if path == save_path else save_path.parent


def is_folder(save_path: Path) -> bool:
    """Whether `--save_path` is a folder: one that is there, or a name without the suffix of a picture or latent."""
    # os.path's, which takes a name that is too long for one that is not there
    return os.path.isdir(save_path) or save_path.suffix.lower() not in (PNG, LATENT, *_OTHER_PICTURES)


def _numbers(folder: Path) -> Iterator[int]:
    """The numbers of results that lie in a folder, of any kind."""
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _NUMBERED.fullmatch(path.name):
                yield int(match[1])


def _beside(save_path: Path, end: str, suffix: str) -> Path:
    """`--save_path` with `end` before its suffix, which keeps the user's spelling where it is the one wanted."""
    own = save_path.suffix
    return save_path.with_name(save_path.stem + end + (own if own.lower() == suffix else suffix))


PREFIX = ".hyimg-infer-"
_RECORD, _DONE, _LOCK = "job.json", "done", "lock"


class RenderJob:
    """The results of one command: their files, which of them are `done`, and whether an earlier run `is_continued`.

        with RenderJob(output, items, drawn_seeds, report) as job:
            for index in job.pending:
                if not job.has_latent(index, settings, vae):
                    job.keep(index, Rendered(latent, settings))
            for index in job.pending:
                job.complete(index, {".png": data})

    `items` are what each result is made with, as JSON takes it, without seeds that were drawn: those are in `seeds`,
    None for the others, and a run that is continued has them from the one that was stopped.
    """

    def __init__(
        self,
        output: InferOutput,
        items: Sequence[Mapping[str, object]],
        seeds: Sequence[int | None],
        report: Reporter,
    ) -> None:
        """Raises HyimgError where results cannot be written, or would replace files that are there."""
        assert output.save_path is not None
        require_writable_folder(output.save_path if is_folder(output.save_path) else output.save_path.parent)
        self.output = output
        self.report = report
        self.seeds = list(seeds)
        self.done: set[int] = set()
        self._first = first_free_number(output.save_path) if is_folder(output.save_path) else None
        self._root = output.save_path if self._first is not None else output.save_path.parent
        self._name = PREFIX + _identity(output, items)
        self._lock = ExitStack()
        self._folder, self._is_locked = self._unfinished()
        self.is_continued = self._is_locked
        try:
            waiting = [self._latent_path(index).is_file() for index in range(len(items))]
            may_exist = [index in self.done or waiting[index] for index in range(len(items))]
            self.results = result_files(output, len(items), first=self._first, may_exist=may_exist)
        except BaseException:
            self._lock.close()
            raise
        self.done = {index for index in self.done if all(p.exists() for p in self.results[index].values())}
        if self.done or any(waiting):
            report.note(
                f"kept from the run that was stopped: {len(self.done)} of {count_text(len(items), 'result')} and "
                f"{count_text(sum(waiting), 'latent')} to decode"
            )
        self._report_others()

    @property
    def pending(self) -> list[int]:
        """The results that are not complete."""
        return [index for index in range(len(self.results)) if index not in self.done]

    def has_latent(self, index: int, settings: Mapping[str, object], vae: VAEArch) -> bool:
        """Whether the latent is there that is rendered with `settings` and not decoded yet."""
        path = self._latent_path(index)
        if is_link(path) or not path.is_file():
            return False
        try:
            recorded = read_latent(path, vae).settings
        except HyimgError as error:  # whatever is wrong with it, it is rendered again
            raise_system_limit(error)
            return False
        return recorded == as_recorded(settings)

    def latent(self, index: int, vae: VAEArch) -> Tensor:
        """The latent that was kept (batch 1, scaled, float32, CPU)."""
        return read_latent(self._latent_path(index), vae).latent_BCHW

    def keep(self, index: int, rendered: Rendered) -> None:
        """Keeps a latent on disk until its result is complete."""
        self._begin()
        write_latent(rendered, self._latent_path(index), root=self._root)

    def complete(self, index: int, contents: Mapping[str, bytes]) -> list[Path]:
        """Writes the files of a result, by suffix, and gives their paths."""
        self._begin()
        files = self.results[index]
        written = [
            write_result(self.output, files, suffix, data, may_be_own=self.is_continued)
            for suffix, data in contents.items()
        ]
        with open_to_append(self._folder / _DONE, root=self._root) as file:
            file.write(b"%d\n" % index)
        self.done.add(index)
        remove_file(self._latent_path(index), root=self._root)
        return written

    def __enter__(self) -> RenderJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_locked:
            return
        latents = sum(self._latent_path(index).is_file() for index in self.pending)
        is_over = not self.pending or not (self.done or latents)
        if is_over:
            self._empty()
        else:
            self.report.note(
                f"{count_text(len(self.done), 'result')} of {len(self.results)} complete, "
                f"{count_text(latents, 'latent')} kept: the same command continues here"
            )
        self._lock.close()
        if is_over:
            with suppress(OSError):
                self._folder.rmdir()

    # ---- the folder

    def _latent_path(self, index: int) -> Path:
        return self._folder / f"{index + 1:05}{LATENT}"

    def _unfinished(self) -> tuple[Path, bool]:
        """The folder of a run of this command that was stopped, locked; else the name of one that is to be made."""
        for folder in self._folders():
            if not folder.is_dir():
                return folder, False
            if self._locks(folder):
                self._read(folder)
                return folder, True
        raise AssertionError("the names do not end")

    def _begin(self) -> None:
        """Makes the folder, unless it is there already."""
        if self._is_locked:
            return
        self._folder = next(folder for folder in self._folders() if self._locks(folder))
        self._is_locked = True
        record = {"first": self._first, "seeds": self.seeds}
        atomic_write_text(self._folder / _RECORD, json.dumps(record), root=self._root)

    def _folders(self) -> Iterator[Path]:
        """The names of this command's folder; a second one is for a run of the same command at the same time."""
        for number in count(1):
            folder = self._root / (self._name + (f"-{number}" if number > 1 else ""))
            if folder.is_symlink():
                raise HyimgError(
                    f"`{folder}` is a link, and a folder of hyimg belongs there", hint="remove it"
                )
            yield folder

    def _locks(self, folder: Path) -> bool:
        busy = HyimgError(f"another process is rendering with `{folder}`")
        try:
            self._lock.enter_context(sole_process(folder / _LOCK, busy, root=self._root))
        except HyimgError as error:
            if error is not busy:
                raise
            return False
        return True

    def _read(self, folder: Path) -> None:
        """Takes over seeds, numbers and what is complete; nothing where the record is missing or not ours."""
        try:
            record = parse_json(read_bounded(folder / _RECORD, MAX_JSON_BYTES), "it")
            lines = read_text(folder / _DONE, MAX_JSON_BYTES) if (folder / _DONE).exists() else ""
        except (HyimgError, OSError, UnicodeDecodeError):
            return
        if not self._fits(record):
            return
        self._first, self.seeds = record["first"], record["seeds"]
        # a last line without its end is of a write that was cut off
        numbers = [line for line in lines.splitlines(keepends=True) if line.strip().isdecimal()]
        self.done = {int(line) for line in numbers if line.endswith("\n")} & set(range(len(self.seeds)))
        text = "".join(f"{index}\n" for index in sorted(self.done))
        atomic_write_text(folder / _DONE, text, root=self._root)

    def _fits(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is one of this command: it may be anybody's file."""
        first, seeds = record.get("first"), record.get("seeds")
        return isinstance(seeds, list) and (
            (type(first) is int and 0 < first < MAX_SEED if self._first is not None else first is None)
            and len(seeds) == len(self.seeds)
            and all(
                old is None if drawn is None else type(old) is int and 0 <= old <= MAX_SEED
                for old, drawn in zip(seeds, self.seeds, strict=True)
            )
        )

    def _empty(self) -> None:
        """Removes what runs leave in the folder, the record first: what is left without it is nothing."""
        own = {_RECORD, _DONE, *(self._latent_path(index).name for index in range(len(self.results)))}
        names = {entry.name for entry in list_folder(self._folder, root=self._root)}
        for name in sorted(names & own, key=lambda name: name != _RECORD):
            remove_file(self._folder / name, root=self._root)
        stems = {temporary_stem(name) for name in own}
        remove_leftovers(self._folder, stems.__contains__, root=self._root)

    def _report_others(self) -> None:
        """Names the folders that runs with other settings have left here."""
        for entry in list_folder(self._root, root=self._root):
            folder = self._root / entry.name
            is_other = entry.name.startswith(PREFIX) and not entry.name.startswith(self._name)
            if not is_other or not is_own_folder(entry) or not (folder / _RECORD).is_file():
                continue
            with suppress(HyimgError), sole_process(folder / _LOCK, HyimgError("in use"), root=self._root):
                self.report.note(
                    f"`{folder}` is of a run with other settings that was stopped: that command continues it; "
                    "remove the folder if it is not wanted"
                )


def _identity(output: InferOutput, items: Sequence[Mapping[str, object]]) -> str:
    assert output.save_path is not None
    what = {
        "version": __version__,
        "name": None if is_folder(output.save_path) else output.save_path.name,
        "files": SUFFIXES[output.output_type],
        "no_metadata": output.no_metadata,
        "items": items,
    }
    return hashlib.sha256(settings_text(what).encode("utf-8", "surrogatepass")).hexdigest()[:16]
