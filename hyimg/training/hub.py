"""A repository on the Hugging Face hub: found or made before a run, and states that a run goes on from.

huggingface_hub is imported where it is used: most runs have nothing to do with a hub.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hyimg.config.run import Hub
from hyimg.errors import HyimgError
from hyimg.plugins import describe
from hyimg.training.resume import LATEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FORBIDDEN = (401, 402, 403)
_REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class Repository:
    """A repository, and the folder in it that a run uses (empty: its top)."""

    repo_id: str
    repo_type: str
    folder: str = ""

    @classmethod
    def of(cls, options: Hub) -> Repository:
        """As the options say. Raises HyimgError for a name or a folder that the hub cannot have."""
        assert options.huggingface_repo_id is not None
        _check_repo_id(options.huggingface_repo_id, "--huggingface_repo_id")
        folder = (options.huggingface_path_in_repo or "").strip("/")
        if "\\" in folder or any(part in ("", ".", "..") for part in folder.split("/") if folder):
            raise HyimgError(
                f"`--huggingface_path_in_repo` `{options.huggingface_path_in_repo}` is no folder of a repository",
                hint="give names with slashes between them, say `loras/cat`",
            )
        return cls(options.huggingface_repo_id, options.huggingface_repo_type, folder)

    def path(self, name: str) -> str:
        """Where a file or folder of that name lies in the repository."""
        return str(PurePosixPath(self.folder, name))


def open_api(token: str | None) -> HfApi:
    """The hub as its own client sees it, without that client's bars; no token means the one that is stored."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return HfApi(token=token)


def ensure_repository(api: HfApi, repository: Repository, visibility: str | None) -> bool:
    """Makes sure that the repository is there and may be written to; gives whether it was made just now.

    A new one is private where nothing is said. Raises HyimgError where the hub cannot be reached or does not
    allow it, and where a repository that is there has another visibility than the one asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo_id, repo_type = repository.repo_id, repository.repo_type
    with answered(f"cannot use the repository `{repo_id}`"):
        try:
            found: Any = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            if repository.repo_type == "space":
                raise HyimgError(
                    f"there is no space `{repo_id}` that this token may use",
                    hint="make it on the hub first: a space needs to know what it runs",
                ) from None
            api.create_repo(repo_id, repo_type=repo_type, private=visibility != "public")
            return True
        there = "private" if found.private else "public"
        if visibility not in (None, there):
            raise HyimgError(
                f"`--huggingface_repo_visibility {visibility}`, and `{repo_id}` is {there}",
                hint="change it on the hub, or leave the option out",
            )
        if "write" in inspect.signature(api.auth_check).parameters:  # older releases cannot ask
            api.auth_check(repo_id, repo_type=repo_type, write=True)
    return False


def download_state(given: str, token: str | None) -> Path:
    """The folder of a state on the hub, `OWNER/NAME/PATH[:REVISION[:TYPE]]`, fetched into the hub's own cache.

    Raises HyimgError where it is not there or cannot be had.
    """
    if given == LATEST:
        raise HyimgError(
            f"`--resume {LATEST}` with `--resume_from_huggingface`",
            hint="name the state: `--resume OWNER/NAME/PATH`, with `:REVISION` behind it where it is not on main",
        )
    place, _, rest = given.partition(":")
    revision, _, repo_type = rest.partition(":")
    repo_id, path = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:]).strip("/")
    _check_repo_id(repo_id, "--resume")
    if not path or (repo_type or "model") not in _REPO_TYPES:
        raise HyimgError(
            f"`--resume` `{given}` names no state on the hub",
            hint="give `OWNER/NAME/PATH[:REVISION[:TYPE]]`, TYPE one of model, dataset, space",
        )
    api = open_api(token)
    with answered(f"cannot fetch `{path}` from `{repo_id}`"):
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
            hint="look at the repository's files on the hub",
        )
    return state


@contextmanager
def answered(trouble: str) -> Iterator[None]:
    """A block whose failures become one HyimgError that begins with `trouble`."""
    try:
        yield
    except HyimgError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        way_out = "check the network and `HF_ENDPOINT`, and try again"
        if status in _FORBIDDEN:
            way_out = (
                "give a token that may write there: `hf auth login`, `HF_TOKEN` or `--huggingface_token`"
            )
        elif status == 404:
            way_out = "check the name, and that the token may read it"
        raise HyimgError(f"{trouble}: {reason(error)}", hint=way_out) from error


def reason(error: Exception) -> str:
    """What the hub, or the way to it, says on one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return describe(error)
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
            f"`{option}` `{repo_id}` is no name of a repository",
            hint="give `OWNER/NAME`, of letters, digits, `-`, `_` and `.`",
        ) from None
