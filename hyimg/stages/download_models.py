"""`hyimg download-models`: the files of the model from the hub into one folder, ready for every other command.

The folder itself only ever holds whole files; what is on its way, and what is known of files that were checked, lies
in a hidden folder in it.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.download import HubFile, fetch, install, is_complete, look_up
from hyimg.cache.index import Index
from hyimg.config.commands import DownloadModelsConfig
from hyimg.errors import HyimgError, Terminated, did_you_mean
from hyimg.model.release import VARIANTS, ReleasedFile
from hyimg.report import Reporter, Task, count_text, size_text

WORK_FOLDER = ".hyimg-download"
_MB = 1_000_000


@dataclass(frozen=True)
class Wanted:
    """A file to have: what is released, what the hub tells of it, where it goes and where it grows."""

    released: ReleasedFile
    hub: HubFile
    path: Path
    partial: Path

    @property
    def fits(self) -> bool:
        """Whether a file of this size is in the place."""
        return self.path.is_file() and self.path.stat().st_size == self.hub.size

    @property
    def missing_bytes(self) -> int:
        """What is still to come."""
        there = self.partial.stat().st_size if self.partial.is_file() else 0
        return self.hub.size - (there if there <= self.hub.size else 0)


def download_models(config: DownloadModelsConfig, report: Reporter) -> dict[str, Path]:
    """Fetches what the folder lacks, and prints commands that use it. Gives the files by option.

    Everything is asked of the hub and checked against the disk before the first byte comes. Raises `HyimgError`
    for what the hub does not have or does not give, a disk with too little room, and files of other content
    that are in the place (unless `overwrite`); `RunError` where a download cannot be finished.
    """
    options = config.download
    assert options.directory is not None
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
    """The revision of each repository; of two that name one, the last holds."""
    revisions = dict.fromkeys(repositories, "main")
    for text in given:
        repository, equals, name = text.rpartition("=")
        if not name or (equals and repository not in revisions):
            raise HyimgError(
                f"`--revision {text}` names no repository that files come from",
                hint=did_you_mean(repository, revisions) or f"they are {', '.join(sorted(revisions))}",
            )
        revisions.update(dict.fromkeys([repository] if equals else repositories, name))
    return revisions


def _look_up(file: ReleasedFile, folder: Path, revision: str, token: str | None) -> Wanted:
    hub = look_up(file.repository, file.path, revision=revision, token=token)
    # another revision is another file, so that the two never grow into one; a tag may hold what no name may
    tag = hashlib.sha256(hub.etag.encode()).hexdigest()[:12]
    return Wanted(file, hub, folder / file.name, folder / WORK_FOLDER / f"{file.name}.{tag}.partial")


@contextmanager
def _work_folder(folder: Path) -> Iterator[Index]:
    """The hidden folder, for one process at a time; what is remembered of checked files is in the index."""
    work = folder / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise HyimgError(
            f"another process is downloading into `{folder}`", hint="wait for it, or choose another folder"
        ) from error
    index = Index(work)
    try:
        yield index
    finally:
        index.close()
        lock.release()


def _is_there(file: Wanted, index: Index, report: Reporter, overwrite: bool) -> bool:
    """Whether the whole file is in its place. Raises HyimgError for something else that must not be replaced."""
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
        f"`{file.path}` is there and is not the file that `{file.hub.repository}` has ({size_text(file.hub.size)})",
        hint="choose another folder, or give `--overwrite`",
    )


def _require_room(folder: Path, missing: Sequence[Wanted]) -> None:
    needed = sum(file.missing_bytes for file in missing)
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if needed > free:
        raise HyimgError(
            f"`{folder}` has {size_text(free)} free, and {size_text(needed)} are still to come",
            hint="free some space, or choose a folder on another disk",
        )


def _summary(folder: Path, wanted: Sequence[Wanted], missing: Sequence[Wanted]) -> str:
    there = len(wanted) - len(missing)
    if not missing:
        return f"all {count_text(len(wanted), 'file')} are in `{folder}`, whole"
    still = size_text(sum(file.missing_bytes for file in missing))
    return f"{there} of {len(wanted)} files are in `{folder}`; {still} to come"


def _fetch(file: Wanted, token: str | None, index: Index, report: Reporter) -> None:
    for stale in file.partial.parent.glob(f"{file.path.name}.*.partial"):
        if stale != file.partial:
            stale.unlink()
    done = file.hub.size - file.missing_bytes
    try:
        with _progress(file.path.name, file.hub.size, report, done=done) as progress:
            fetch(file.hub, file.partial, token=token, advance=progress, note=report.note)
    except (KeyboardInterrupt, Terminated):
        if file.partial.is_file():
            kept = size_text(file.partial.stat().st_size)
            report.note(f"{kept} of {file.path.name} are kept; the same command goes on from there")
        raise
    with _progress(f"checking {file.path.name}", file.hub.size, report) as progress:
        compared = install(file.hub, file.partial, file.path, index, progress=progress)
    if not compared:
        report.note(f"{file.path.name}: the hub gives no hash, so that only its size was checked")


@contextmanager
def _progress(title: str, size: int, report: Reporter, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Progress in megabytes over `size` bytes, told in bytes; nothing is shown for less than one megabyte."""
    if size < _MB:
        yield lambda _: None
        return
    with report.task(title, size // _MB, unit="MB", done=done // _MB) as task:
        yield _Megabytes(task, done)


class _Megabytes:
    """Adds up bytes, and tells a task of each whole megabyte."""

    def __init__(self, task: Task, done: int) -> None:
        self._task, self._bytes, self._told = task, done, done // _MB

    def __call__(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        whole = self._bytes // _MB
        if whole != self._told:
            self._task.advance(whole - self._told)
            self._told = whole


def _print_next_commands(files: Mapping[str, Path], report: Reporter) -> None:
    """To stdout, as a shell takes them."""

    def command(stage: str, *options: str, **more: str) -> str:
        words = [stage, *(word for name in options for word in (f"--{name}", str(files[name])))]
        return shlex.join(["hyimg", *words, *(word for k, v in more.items() for word in (f"--{k}", v))])

    report.note(
        "to try the model (below 40 GB on the card `infer` and `train` need options for memory, which docs/memory.md"
        " tells):"
    )
    models = ("dit", "text_encoder", "byt5", "vae")
    print(command("infer", *models, prompt='a cat in a shop with the sign "OPEN"', save_path="cat.png"))
    report.note("to train, with a dataset file of yours:")
    print(command("cache-latents", "vae", dataset_config="dataset.toml"))
    print(command("cache-text", "text_encoder", "byt5", dataset_config="dataset.toml"))
    print(command("train", "dit", dataset_config="dataset.toml", output_dir="runs/first"), flush=True)
