"""`hyimg download-models`: downloads the model's files from the hub to one folder.

The folder only ever holds complete files; partial downloads and the record of checked files are in a hidden folder in
it.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.atomic import require_writable_folder, sole_process
from hyimg.cache.download import HubFile, fetch, install, is_complete, look_up
from hyimg.cache.index import Index
from hyimg.cache.own_files import is_link, list_folder, remove_file
from hyimg.checkpoints.model_files import VARIANTS, ReleasedFile
from hyimg.config.tools import DownloadModelsConfig
from hyimg.errors import HyimgError, Terminated, did_you_mean
from hyimg.report import Reporter, Task, count_text, say, size_text

WORK_FOLDER = ".hyimg-download"
_MB = 1_000_000


@dataclass(frozen=True)
class Wanted:
    """A file to download: its release, the hub's data about it, its path, and that of the partial download."""

    released: ReleasedFile
    hub: HubFile
    path: Path
    partial: Path

    @property
    def fits(self) -> bool:
        """Whether `path` is a file of the right size."""
        return self.path.is_file() and self.path.stat().st_size == self.hub.size

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be downloaded."""
        there = self.partial.stat().st_size if self.partial.is_file() and not is_link(self.partial) else 0
        return self.hub.size - (there if there <= self.hub.size else 0)


def download_models(config: DownloadModelsConfig, report: Reporter) -> dict[str, Path]:
    """Downloads missing files, prints commands that use them, and returns the files by option.

    Checks everything with the hub and the disk before the first download. Raises `HyimgError` for files that the hub
    does not have or refuses, for too little disk space, and for existing files with other content (unless
    `overwrite`); `RunError` if a download cannot be finished.
    """
    options = config.download
    folder = require_writable_folder(options.directory)
    released = VARIANTS[options.variant]
    revisions = _revisions(options.revision, [file.repository for file in released])
    wanted = [_look_up(file, folder, revisions[file.repository], options.token) for file in released]
    for file in wanted:
        if file.path.exists() and not file.fits and not (options.overwrite and file.path.is_file()):
            raise _other_content(file)
    _require_room(folder, [file for file in wanted if not file.fits])
    with _work_folder(folder) as index:
        missing = [file for file in wanted if not _is_there(file, index, report, options.overwrite)]
        report.note(_summary(folder, wanted, missing))
        for file in missing:
            _fetch(file, options.token, index, report)
    files = {file.released.option: file.path for file in wanted if file.released.option is not None}
    _print_next_commands(files, report)
    return files


def _revisions(given: Sequence[str], repositories: Sequence[str]) -> dict[str, str]:
    """The revision of each repository; the last one given for a repository wins."""
    revisions = dict.fromkeys(repositories, "main")
    for text in given:
        repository, equals, name = text.rpartition("=")
        if not name or (equals and repository not in revisions):
            raise HyimgError(
                f"`--revision {text}` does not name a repository of these files",
                hint=did_you_mean(repository, revisions) or f"they are {', '.join(sorted(revisions))}",
            )
        revisions.update(dict.fromkeys([repository] if equals else repositories, name))
    return revisions


def _look_up(file: ReleasedFile, folder: Path, revision: str, token: str | None) -> Wanted:
    hub = look_up(file.repository, file.path, revision=revision, token=token)
    # by etag, so that partial files of two revisions never mix; hashed, as it may hold characters that names may not
    tag = hashlib.sha256(hub.etag.encode()).hexdigest()[:12]
    return Wanted(file, hub, folder / file.name, folder / WORK_FOLDER / f"{file.name}.{tag}.partial")


def _is_partial(name: str, of: str) -> bool:
    """Whether a file in the hidden folder is a partial download of the file `of`."""
    return re.fullmatch(re.escape(of) + r"\.[0-9a-f]{12}\.partial", name) is not None


@contextmanager
def _work_folder(folder: Path) -> Iterator[Index]:
    """Locks the hidden folder for this process; the index records checked files."""
    work = folder / WORK_FOLDER
    busy = HyimgError(
        f"another process is downloading into `{folder}`",
        hint="wait until it has finished, or choose another folder",
    )
    with sole_process(work / "lock", busy, root=folder), closing(Index(work)) as index:
        yield index


def _is_there(file: Wanted, index: Index, report: Reporter, overwrite: bool) -> bool:
    """Whether the complete file exists. Raises HyimgError for other content that must not be replaced."""
    if not file.fits:
        return False
    with _progress(f"checking {file.path.name}", file.hub.size, report) as progress:
        if is_complete(file.hub, file.path, index, progress=progress):
            return True
    if not overwrite:
        raise _other_content(file)
    return False


def _other_content(file: Wanted) -> HyimgError:
    return HyimgError(
        f"`{file.path}` exists and is not the file of `{file.hub.repository}` ({size_text(file.hub.size)})",
        hint="choose another folder, or give `--overwrite`",
    )


def _require_room(folder: Path, missing: Sequence[Wanted]) -> None:
    needed = sum(file.missing_bytes for file in missing)
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if needed > free:
        raise HyimgError(
            f"`{folder}` has {size_text(free)} free, and {size_text(needed)} must be downloaded",
            hint="free some space, or choose a folder on another disk",
        )


def _summary(folder: Path, wanted: Sequence[Wanted], missing: Sequence[Wanted]) -> str:
    there = len(wanted) - len(missing)
    if not missing:
        return f"all {count_text(len(wanted), 'file')} are complete in `{folder}`"
    still = size_text(sum(file.missing_bytes for file in missing))
    return f"{there} of {len(wanted)} files are in `{folder}`; {still} to download"


def _fetch(file: Wanted, token: str | None, index: Index, report: Reporter) -> None:
    folder = file.path.parent
    for entry in list_folder(file.partial.parent, root=folder):
        # of another revision
        if _is_partial(entry.name, file.path.name) and entry.name != file.partial.name:
            remove_file(entry.path, root=folder)
    done = file.hub.size - file.missing_bytes
    try:
        with _progress(file.path.name, file.hub.size, report, done=done) as progress:
            fetch(file.hub, file.partial, root=folder, token=token, advance=progress, note=report.note)
    except (KeyboardInterrupt, Terminated):
        if file.partial.is_file():
            kept = size_text(file.partial.stat().st_size)
            report.note(f"{kept} of {file.path.name} are kept; run the same command to resume")
        raise
    with _progress(f"checking {file.path.name}", file.hub.size, report) as progress:
        compared = install(file.hub, file.partial, file.path, index, progress=progress)
    if not compared:
        report.note(f"{file.path.name}: the hub gives no hash, so only the size was checked")


@contextmanager
def _progress(title: str, size: int, report: Reporter, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress task in megabytes that is advanced in bytes; nothing is shown for less than one megabyte."""
    if size < _MB:
        yield lambda _: None
        return
    with report.task(title, size // _MB, unit="MB", done=done // _MB) as task:
        yield _Megabytes(task, done)


class _Megabytes:
    """Adds up bytes, and advances a task by each full megabyte."""

    def __init__(self, task: Task, done: int) -> None:
        self._task, self._bytes, self._shown = task, done, done // _MB

    def __call__(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        megabytes = self._bytes // _MB
        if megabytes != self._shown:
            self._task.advance(megabytes - self._shown)
            self._shown = megabytes


def _print_next_commands(files: Mapping[str, Path], report: Reporter) -> None:
    """Prints commands to stdout, quoted for a shell."""

    def command(stage: str, *options: str, **more: str) -> str:
        words = [stage, *(word for name in options for word in (f"--{name}", str(files[name])))]
        return shlex.join(["hyimg", *words, *(word for k, v in more.items() for word in (f"--{k}", v))])

    report.note(
        "to try the model (on a GPU with less than 40 GB, `infer` and `train` need memory options: see "
        "docs/memory.md):"
    )
    models = ("dit", "text_encoder", "byt5", "vae")
    say(command("infer", *models, prompt='a cat in a shop with the sign "OPEN"', save_path="cat.png"))
    report.note("to train, with your own dataset file:")
    say(command("cache-latents", "vae", dataset_config="dataset.toml"))
    say(command("cache-text", "text_encoder", "byt5", dataset_config="dataset.toml"))
    say(command("train", "dit", dataset_config="dataset.toml", output_dir="runs/first"))
