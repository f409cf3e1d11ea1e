"""`hyimg train` and a hub: a server on this machine plays it, and says what was asked of it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hyimg.training.metrics import COST_FIELDS

TOKEN = "hf_aSecretThatMustNotBeSeen"
REPO = "me/cats"


class LocalHub(ThreadingHTTPServer):
    """One repository in memory, and one token that may write to it.

    `refuse` maps a pattern of paths to the status that they are answered with; `slow` are seconds that each
    file takes to arrive.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.is_private: bool | None = None  # None: there is no repository
        self.refuse: dict[str, int] = {}
        self.slow = 0.0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def revision(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode() + b"%d" % len(self.commits)).hexdigest()

    def commit(self, lines: list[dict]) -> None:
        added = []
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
                added.append(value["path"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits.append((lines[0]["value"]["summary"], added))

    def folder(self, prefix: str) -> dict[str, bytes]:
        return {name[len(prefix) :]: data for name, data in self.files.items() if name.startswith(prefix)}


class _Hub(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        for pattern, status in hub.refuse.items():
            if re.search(pattern, f"{self.command} {path}"):
                return self._json({"error": "no"}, status)
        if path.startswith("/blobs/"):
            time.sleep(hub.slow)
            hub.blobs[path.rpartition("/")[2]] = body
            return self._json({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.is_private = asked.get("private", asked.get("visibility") == "private")
            return self._json({"url": f"{hub.url}/{asked.get('organization', 'me')}/{asked['name']}"})
        if hub.is_private is None or REPO not in path:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self._of_repository(path, body)

    def _of_repository(self, path: str, body: bytes) -> None:
        hub = self.server
        if path.endswith("/auth-check/write"):
            return self._json({})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            kinds = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": n, "uploadMode": k, "shouldIgnore": False} for n, k in kinds.items()]
            return self._json({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**blob, "actions": {"upload": {"href": f"{hub.url}/blobs/{blob['oid']}"}}}
                for blob in json.loads(body)["objects"]
            ]
            return self._json({"objects": objects, "transfer": "basic"})
        if "/commit/" in path:
            hub.commit([json.loads(line) for line in body.splitlines()])
            answer = {"commitUrl": f"{hub.url}/{REPO}/commit/{hub.revision}", "commitOid": hub.revision}
            return self._json({**answer, "success": True})
        if "/tree/" in path:
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
            )
        if "/resolve/" in path:
            data = hub.files[path.split("/resolve/")[1].partition("/")[2]]
            etag = hashlib.sha256(data).hexdigest()
            return self._send(data, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.revision})
        info = {
            "id": REPO,
            "private": hub.is_private,
            "sha": hub.revision,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        return self._json({**info, "siblings": [{"rfilename": name} for name in hub.files]})

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._send(json.dumps(value).encode(), status, headers)

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def arguments(cached_dataset):
    """A command line that trains into a folder, with the hub's token."""

    def write(folder: Path, *extra: object, token: str = TOKEN) -> list[str]:
        given = [
            "train",
            "--dataset_config",
            cached_dataset,
            "--output_dir",
            folder,
            "--huggingface_token",
            token,
        ]
        given += "--seed 7 --mixed_precision no --device cpu --save_precision float --no_metadata".split()
        return [str(word) for word in [*given, *extra]]

    return write


@pytest.fixture
def start(hub, model, arguments, tmp_path):
    """Starts a training in a process of its own, which sees that hub."""

    def call(name: str, *extra: object) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        words = [sys.executable, "-m", "hyimg", *arguments(tmp_path / name, "--dit", model.dit, *extra)]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)

    return call


@pytest.fixture
def process(start, tmp_path):
    """Trains in such a process to the end; gives (stderr, run folder)."""

    def call(name: str, *extra: object) -> tuple[str, Path]:
        ran = start(name, *extra)
        _, err = ran.communicate(timeout=120)
        assert ran.returncode == 0, err
        return err, tmp_path / name

    return call


@pytest.fixture
def train(hub, hyimg, arguments, monkeypatch, tmp_path):
    """Trains in this process, whose client of the hub has read no environment; gives (code, stderr, run folder)."""
    for name, value in (
        *(("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)),
        *(("ENDPOINT", hub.url), ("HF_HUB_CACHE", str(tmp_path / "hf"))),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    def call(*extra: object, token: str = TOKEN) -> tuple[int, str, Path]:
        folder = tmp_path / "run"
        words = arguments(folder, "--dit", "{dit}", "--max_train_steps", 1, *extra, token=token)
        code, _, err = hyimg(*words)
        return code, err, folder

    return call


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_save_is_uploaded_while_training_goes_on_and_a_state_from_there_goes_on_exactly(hub, process):
    # slower than the steps: files that are rotated away must still arrive
    hub.slow = 0.3
    err, folder = process(
        *("run", "--huggingface_repo_id", REPO, "--huggingface_path_in_repo", "loras/cat", "--async_upload"),
        *"--save_every_n_steps 1 --save_last_n_steps 1 --save_state --save_state_to_huggingface".split(),
        *"--max_train_steps 4 --log_with all --log_config".split(),
    )
    assert hub.is_private is True, "nothing was said"
    assert "waiting for" in err
    steps = [f"lora-step{step:08}" for step in (1, 2, 3, 4)]
    expected = [(f"Upload {name}.safetensors", f"Upload {name}-state") for name in [*steps, "lora"]]
    assert [summary for summary, _ in hub.commits] == [text for pair in expected for text in pair]
    on_hub, on_disk = hub.folder("loras/cat/"), written(folder)
    assert {f"{name}.safetensors" for name in steps} <= set(on_hub), "rotated ones too"
    kept = {name: data for name, data in on_disk.items() if name.endswith(".safetensors")}
    kept |= {name: data for name, data in on_disk.items() if "-state/" in name}
    assert "comfy/lora.safetensors" in kept
    assert "lora-state/manifest.json" in kept
    assert kept.items() <= on_hub.items()
    assert not [name for name, data in on_disk.items() if TOKEN.encode() in data], "in no file of the run"
    assert TOKEN not in err

    # from the state of the second step, which is on the hub alone
    assert "lora-step00000002-state/manifest.json" not in on_disk
    hub.slow = 0.0
    err, again = process(
        *("again", "--resume_from_huggingface", "--resume", f"{REPO}/loras/cat/lora-step00000002-state:main"),
        *("--max_train_steps", 4),
    )
    assert (again / "lora.safetensors").read_bytes() == on_disk["lora.safetensors"]
    assert metrics(again) == metrics(folder)[2:]
    assert "metrics" in err, "whose first lines are not on the hub"
    assert "resume" not in (again / "lora.run.toml").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_of_two_processes_that_are_asked_to_stop_the_one_that_uploads_is_waited_for(hub, start, tmp_path):
    run = start(
        *("run", "--huggingface_repo_id", REPO, "--async_upload", "--save_state_to_huggingface"),
        *("--save_state", "--max_train_steps", 100000, "--num_processes", 2),
    )
    metrics_path = tmp_path / "run" / "lora.metrics.jsonl"
    while run.poll() is None and not (metrics_path.is_file() and metrics_path.read_text()):
        time.sleep(0.05)
    hub.slow = 0.5
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    (state,) = (tmp_path / "run").glob("lora-step*-state")
    assert f"{state.name}/manifest.json" in hub.files, err
    assert "not uploaded" not in err


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "lora.metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in lines]


def test_a_hub_that_fails_costs_a_warning_and_no_file(hub, train):
    hub.is_private = False
    hub.refuse = {"POST .*/commit/": 500}
    code, err, folder = train("--huggingface_repo_id", REPO)
    assert code == 0, err
    path = folder / "lora.safetensors"
    comfy = folder / "comfy" / "lora.safetensors"
    assert f"warning: not uploaded, still on disk: `{path}` and `{comfy}`: the hub answers 500" in err
    assert (
        f"`hf upload {REPO} {path} lora.safetensors; hf upload {REPO} {comfy} comfy/lora.safetensors`" in err
    )
    assert load_file(path)
    assert hub.files == {}


@pytest.mark.parametrize(
    ("extra", "token", "parts"),
    [
        ([], "hf_another", ["the hub answers 401", "hint: use a token"]),
        (["--huggingface_repo_visibility", "private"], TOKEN, [f"`{REPO}` is public"]),
        (["--huggingface_repo_type", "dataset"], TOKEN, ["the hub answers 403", "hint: use a token"]),
        (["--huggingface_path_in_repo", "../up"], TOKEN, ["`../up` is not a folder"]),
    ],
)
def test_what_the_hub_does_not_allow_is_said_before_anything_is_made(hub, train, extra, token, parts):
    hub.is_private = False
    hub.refuse = {"/api/datasets/.*/auth-check": 403}
    code, err, folder = train("--huggingface_repo_id", REPO, *extra, token=token)
    assert code == 2
    assert all(part in err for part in parts), err
    assert token not in err
    assert not folder.exists()
    assert hub.commits == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--huggingface_repo_id", "cats"], "`cats` is not a repository name"),
        (["--save_state_to_huggingface"], "without `--huggingface_repo_id`"),
        (["--resume_from_huggingface"], "without `--resume`"),
        (["--resume_from_huggingface", "--resume", "latest"], "name the state"),
        (["--resume_from_huggingface", "--resume", REPO], "is not a state on the hub"),
        (["--resume_from_huggingface", "--resume", f"{REPO}/lora-state"], "has no folder `lora-state`"),
        (
            ["--resume_from_huggingface", "--resume", "me/dogs/lora-state"],
            "cannot download `lora-state` from `me/dogs`",
        ),
    ],
)
def test_options_that_name_nothing_on_the_hub_are_one_sentence(hub, train, extra, message):
    hub.is_private = False
    code, err, folder = train(*extra)
    assert code == 2
    assert message in err
    assert not folder.exists()


def test_nothing_is_made_on_the_hub_for_a_run_that_is_only_looked_at(hub, train):
    assert train("--huggingface_repo_id", REPO, "--output_config")[0] == 0
    assert hub.asked == []


def test_a_repository_is_as_visible_as_asked(hub, train):
    code, err, _ = train("--huggingface_repo_id", REPO, "--huggingface_repo_visibility", "public")
    assert code == 0, err
    assert hub.is_private is False
    assert set(hub.files) == {"lora.safetensors", "comfy/lora.safetensors"}
