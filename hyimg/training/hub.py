"""The Hugging Face hub: uploads of saved LoRAs and states, and downloads of states to resume from.

A failed upload is a warning and the file stays on disk; it never ends a run. Background uploads run one after the
other, in the order of saving, and a file that is due for removal is kept until its upload is over. huggingface_hub is
imported only where it is used, since most runs do not need it.
"""

from __future__ import annotations

import inspect
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hyimg.config.run_options import Hub
from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError, Terminated, exception_text, first_few
from hyimg.report import Reporter, count_text
from hyimg.training.resume import LATEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi


_FORBIDDEN = (401, 402, 403)
_REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class Repository:
    """A repository, and the folder in it that a run uses (empty: its root)."""

    repo_id: str
    repo_type: str
    folder: str = ""

    @classmethod
    def of(cls, options: Hub) -> Repository:
        """From the options. Raises HyimgError for an invalid name or folder."""
        assert options.huggingface_repo_id is not None
        _check_repo_id(options.huggingface_repo_id, "--huggingface_repo_id")
        folder = (options.huggingface_path_in_repo or "").strip("/")
        if "\\" in folder or any(part in ("", ".", "..") for part in folder.split("/") if folder):
            raise HyimgError(
                f"`--huggingface_path_in_repo` `{options.huggingface_path_in_repo}` is not a folder path",
                hint="give names separated by slashes, such as `loras/cat`",
            )
        return cls(options.huggingface_repo_id, options.huggingface_repo_type, folder)

    def path(self, name: str) -> str:
        """Where a file or folder of that name lies in the repository."""
        return str(PurePosixPath(self.folder, name))


def open_api(token: str | None) -> HfApi:
    """The hub client, without progress bars; None means the stored token."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return HfApi(token=token)


def ensure_repository(api: HfApi, repository: Repository, visibility: str | None) -> bool:
    """Creates the repository unless it exists, and checks write access; returns whether it was created.

    A new one is private by default. Raises HyimgError if the hub cannot be reached or refuses, or if an existing
    repository does not have the requested visibility.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo_id, repo_type = repository.repo_id, repository.repo_type
    with answered(f"cannot use the repository `{repo_id}`"):
        try:
            found: Any = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            if repository.repo_type == "space":
                raise HyimgError(
                    f"the space `{repo_id}` does not exist or this token has no access",
                    hint="create it on the hub first: a space needs an SDK",
                ) from None
            api.create_repo(repo_id, repo_type=repo_type, private=visibility != "public")
            return True
        there = "private" if found.private else "public"
        if visibility not in (None, there):
            raise HyimgError(
                f"`--huggingface_repo_visibility {visibility}`, but `{repo_id}` is {there}",
                hint="change it on the hub, or leave the option out",
            )
        if "write" in inspect.signature(api.auth_check).parameters:  # older releases cannot ask
            api.auth_check(repo_id, repo_type=repo_type, write=True)
    return False


def download_state(given: str, token: str | None) -> Path:
    """Downloads a state, `OWNER/NAME/PATH[:REVISION[:TYPE]]`, into the hub's cache; returns its folder.

    Raises HyimgError if it does not exist or cannot be downloaded.
    """
    if given == LATEST:
        raise HyimgError(
            f"`--resume {LATEST}` with `--resume_from_huggingface`",
            hint="name the state: `--resume OWNER/NAME/PATH`, followed by `:REVISION` unless it is on main",
        )
    place, _, rest = given.partition(":")
    revision, _, repo_type = rest.partition(":")
    repo_id, path = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:]).strip("/")
    _check_repo_id(repo_id, "--resume")
    if not path or (repo_type or "model") not in _REPO_TYPES:
        raise HyimgError(
            f"`--resume` `{given}` is not a state on the hub",
            hint="give `OWNER/NAME/PATH[:REVISION[:TYPE]]`, TYPE one of model, dataset, space",
        )
    api = open_api(token)
    with answered(f"cannot download `{path}` from `{repo_id}`"):
        folder = api.snapshot_download(
            repo_id,
            repo_type=repo_type or "model",
            revision=revision or None,
            allow_patterns=[f"{path}/*"],
        )
    state = Path(folder) / path
    if not state.is_dir():
        raise HyimgError(
            f"`{repo_id}` has no folder `{path}`" + (f" at `{revision}`" if revision else ""),
            hint="check the repository's files on the hub",
        )
    return state


@contextmanager
def answered(trouble: str) -> Iterator[None]:
    """A block whose exceptions become one HyimgError that starts with `trouble`."""
    try:
        yield
    except HyimgError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        way_out = "check the network and `HF_ENDPOINT`, and try again"
        if status in _FORBIDDEN:
            way_out = "use a token with write access: `hf auth login`, `HF_TOKEN` or `--huggingface_token`"
        elif status == 404:
            way_out = "check the name, and that the token has read access"
        raise HyimgError(f"{trouble}: {reason(error)}", hint=way_out) from error


def reason(error: Exception) -> str:
    """The hub's or the network's error in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return exception_text(error)
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"the hub answers {status}" + (f" ({said})" if said else "")


def _check_repo_id(repo_id: str, option: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise HyimgError(
            f"`{option}` `{repo_id}` is not a repository name",
            hint="give `OWNER/NAME`, made of letters, digits, `-`, `_` and `.`",
        ) from None


def prepare_uploads(hub: Hub, report: Reporter) -> Uploads | None:
    """The uploads of a run, after its repository was found or created; None if there are none.

    Raises HyimgError for mistakes in the options, the token or the repository.
    """
    if hub.huggingface_repo_id is None:
        if hub.save_state_to_huggingface:
            raise HyimgError(
                "`--save_state_to_huggingface` without `--huggingface_repo_id`", hint="name the repository"
            )
        return None
    repository = Repository.of(hub)
    if not Processes.current().is_main:
        return None
    api = open_api(hub.huggingface_token)
    is_new = ensure_repository(api, repository, hub.huggingface_repo_visibility)
    report.note(f"uploading to {repository.repo_id}" + (" (created)" if is_new else ""))
    return Uploads(
        api, repository, report, states=hub.save_state_to_huggingface, in_background=hub.async_upload
    )


@dataclass(frozen=True)
class _Upload:
    """One commit: the path in the repository of each file or folder on disk."""

    places: Mapping[Path, str]
    send: Callable[[], object]
    over: threading.Event = field(default_factory=threading.Event)


class Uploads:
    """The uploads of a run. The `with` block ends after the last upload, or at once if the run is interrupted."""

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
        """Uploads the files of a save in one commit, under their paths in the run folder."""
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
        """Uploads a state if requested, replacing the folder of that name."""
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
        """Waits until no upload needs `path`."""
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
            self._report_unfinished()
            return
        self._report.note(f"waiting for {count_text(len(pending), 'upload')}")
        try:
            for upload in pending:
                upload.over.wait()
        except (KeyboardInterrupt, Terminated):
            self._report_unfinished()
            raise

    def _report_unfinished(self) -> None:
        names = first_few([f"`{path}`" for upload in list(self._pending) for path in upload.places])
        self._report.warning(f"not uploaded, because the run was interrupted: {names}")

    def _start(self, upload: _Upload) -> None:
        if self._queue is None:
            self._carry_out(upload)
            return
        if self._thread is None:
            # a daemon, so that it does not keep an interrupted process alive
            self._thread = threading.Thread(target=self._work, args=(self._queue,), daemon=True)
            self._thread.start()
        self._pending.append(upload)
        self._queue.put(upload)

    def _work(self, queue: SimpleQueue[_Upload]) -> None:
        while True:
            upload = queue.get()
            try:
                # a closed terminal or pipe cannot be written to; the main thread handles that
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
                f"not uploaded, still on disk: {names}: {reason(error)}; to upload later: `{later}`"
            )
        else:
            places = " and ".join(upload.places.values())
            self._report.note(f"uploaded {places} to {self.repository.repo_id}")

    def _command(self, path: Path, place: str) -> str:
        words = ["hf", "upload", self.repository.repo_id, str(path), place]
        if self.repository.repo_type != "model":
            words += ["--repo-type", self.repository.repo_type]
        return shlex.join(words)
