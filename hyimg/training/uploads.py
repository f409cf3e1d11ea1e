"""Uploads to the hub: every saved LoRA, and the states where asked, as soon as each is saved.

A failure is a warning and the file stays on disk: no upload ends a run. In the background one follows another,
in the order of saving, and what is to be removed from disk waits until it has gone.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from hyimg.config.commands import TrainConfig
from hyimg.errors import HyimgError, Terminated
from hyimg.memory.processes import Processes
from hyimg.report import Reporter, count_text
from hyimg.training.hub import Repository, ensure_repository, open_api, reason

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NEED_REPOSITORY = ("huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload")


def prepare_uploads(config: TrainConfig, report: Reporter) -> Uploads | None:
    """The uploads of a run, its repository found or made; None where there are none to make.

    Raises HyimgError for what is wrong with the options, the token or the repository.
    """
    hub, saving = config.hub, config.saving
    if hub.huggingface_repo_id is None:
        if hub.save_state_to_huggingface:
            raise HyimgError(
                "`--save_state_to_huggingface` without `--huggingface_repo_id`", hint="name the repository"
            )
        for name in _NEED_REPOSITORY:
            if getattr(hub, name):
                report.warning(f"`--{name}` has no effect without `--huggingface_repo_id`")
        return None
    repository = Repository.of(hub)
    if hub.save_state_to_huggingface and not (saving.save_state or saving.save_state_on_train_end):
        report.warning("`--save_state_to_huggingface` has no effect without `--save_state`")
    if not Processes.current().is_main:
        return None
    api = open_api(hub.huggingface_token)
    is_new = ensure_repository(api, repository, hub.huggingface_repo_visibility)
    report.note(f"uploads go to {repository.repo_id}" + (", which was made" if is_new else ""))
    return Uploads(
        api, repository, report, states=hub.save_state_to_huggingface, in_background=hub.async_upload
    )


@dataclass(frozen=True)
class _Upload:
    """What goes in one commit: the place in the repository of each file or folder on disk."""

    places: Mapping[Path, str]
    send: Callable[[], object]
    over: threading.Event = field(default_factory=threading.Event)


class Uploads:
    """The uploads of one run. As a block it ends when the last is over, or at once where the run is cut short."""

    def __init__(
        self, api: HfApi, repository: Repository, report: Reporter, *, states: bool, in_background: bool
    ) -> None:
        self.api = api
        self.repository = repository
        self.states = states
        self._report = report
        self._pending: list[_Upload] = []
        self._queue: SimpleQueue[_Upload] | None = SimpleQueue() if in_background else None
        self._thread: threading.Thread | None = None

    def send_lora(self, files: Sequence[Path], run_folder: Path) -> None:
        """Uploads the files of one save together, each under its path in the run folder."""
        from huggingface_hub import CommitOperationAdd

        places = {file: self.repository.path(file.relative_to(run_folder).as_posix()) for file in files}

        def send() -> None:
            added = [CommitOperationAdd(place, str(file)) for file, place in places.items()]
            self.api.create_commit(
                self.repository.repo_id,
                added,
                commit_message=f"Upload {files[0].name}",
                repo_type=self.repository.repo_type,
            )

        self._start(_Upload(places, send))

    def send_state(self, folder: Path) -> None:
        """Uploads a state where that is asked for, whole, in place of what lies there under its name."""
        if not self.states:
            return
        place = self.repository.path(folder.name)

        def send() -> None:
            self.api.upload_folder(
                repo_id=self.repository.repo_id,
                repo_type=self.repository.repo_type,
                folder_path=str(folder),
                path_in_repo=place,
                delete_patterns=["*"],
                commit_message=f"Upload {folder.name}",
            )

        self._start(_Upload({folder: place}, send))

    def wait_for(self, path: Path) -> None:
        """Returns when no upload needs `path` any more."""
        for upload in list(self._pending):
            if path in upload.places:
                upload.over.wait()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pending = list(self._pending)
        if not pending:
            return
        if kind is not None and not issubclass(kind, HyimgError):
            self._tell_cut_short()
            return
        self._report.note(f"waiting for {count_text(len(pending), 'upload')}")
        try:
            for upload in pending:
                upload.over.wait()
        except (KeyboardInterrupt, Terminated):
            self._tell_cut_short()
            raise

    def _tell_cut_short(self) -> None:
        names = ", ".join(f"`{path}`" for upload in list(self._pending) for path in upload.places)
        self._report.warning(f"not uploaded, since the run was cut short: {names}")

    def _start(self, upload: _Upload) -> None:
        if self._queue is None:
            self._carry_out(upload)
            return
        if self._thread is None:
            # a daemon, so that a process which is told to stop does so
            self._thread = threading.Thread(target=self._work, args=(self._queue,), daemon=True)
            self._thread.start()
        self._pending.append(upload)
        self._queue.put(upload)

    def _work(self, queue: SimpleQueue[_Upload]) -> None:
        while True:
            upload = queue.get()
            try:
                # a terminal or a pipe that is gone takes no note: the main thread finds that out for itself
                with suppress(OSError):
                    self._carry_out(upload)
            finally:
                self._pending.remove(upload)
                upload.over.set()

    def _carry_out(self, upload: _Upload) -> None:
        try:
            upload.send()
        except Exception as error:
            names = " and ".join(f"`{path}`" for path in upload.places)
            later = "; ".join(self._command(path, place) for path, place in upload.places.items())
            self._report.warning(
                f"not uploaded, and still on disk: {names}: {reason(error)}; `{later}` does it later"
            )
        else:
            places = " and ".join(upload.places.values())
            self._report.note(f"uploaded {places} to {self.repository.repo_id}")

    def _command(self, path: Path, place: str) -> str:
        words = ["hf", "upload", self.repository.repo_id, str(path), place]
        if self.repository.repo_type != "model":
            words += ["--repo-type", self.repository.repo_type]
        return shlex.join(words)
