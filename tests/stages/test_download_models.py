"""`download-models` against a server on this machine that plays the hub, faults included.

Commands run in processes of their own: huggingface_hub reads its environment once, when it is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
from filelock import FileLock

from hyimg.cache.download import HubFile
from hyimg.checkpoints.model_files import VARIANTS, ReleasedFile
from hyimg.cli.app import run
from hyimg.encoders.tokenizer import load_qwen_tokenizer
from hyimg.stages import download_models as download_stage
from hyimg.stages.download_models import WORK_FOLDER

BF16 = VARIANTS["bf16"]
DIT, QWEN, TOKENIZER, BYT5, VAE = BF16
COMMIT = "c" * 40
# huggingface_hub hands on what it reads in pieces of this size; less is lost when a connection breaks
PIECE = 10 * 1024 * 1024


class Hub:
    """Files by (repository, path), served as the hub serves them: large ones from another host, by redirect."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        """(method, file's name or request's path, Range, Authorization)"""
        self.cuts: list[int] = []
        """After how many bytes the next answers with content end, by a reset."""
        self.told_size: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.serves_ranges = True
        self.renamed: dict[str, str] = {}
        """Repositories that moved, by their old name: the hub sends whoever asks on to the new one."""
        self.token: str | None = None
        self.held: threading.Event | None = None
        """Keeps an answer back after its first piece, until it is set."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                # a client that was stopped does not listen any more
                with contextlib.suppress(ConnectionError):
                    hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.port = self.server.server_address[1]

    def put(self, file: ReleasedFile, content: bytes) -> None:
        self.files[file.repository, file.path] = content

    def gets(self, file: ReleasedFile) -> list[str | None]:
        """The `Range` of each request for the content of a file."""
        return [
            asked
            for method, name, asked, _ in self.requests
            if (method, name) == ("GET", f"content of {file.name}")
        ]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlparse(request.path).path
        told = request.headers.get("Authorization")
        if path.startswith("/content/"):
            _, _, repository, path = path.split("/", 3)
            name = path.rpartition("/")[2]
            self.requests.append((request.command, f"content of {name}", request.headers.get("Range"), told))
            return self.send(request, name, self.files[repository.replace("--", "/"), path])
        self.requests.append((request.command, path, request.headers.get("Range"), told))
        if "/resolve/" not in path:
            return self.refuse(request, 404, "EntryNotFound")
        owner, name, _, revision, path = path.lstrip("/").split("/", 4)
        repository = f"{owner}/{name}"
        if repository in self.renamed:
            there = f"/{self.renamed[repository]}/resolve/{revision}/{path}"
            return self.respond(request, 307, {"Location": there}, b"")
        content = self.files.get((repository, path))
        if self.token is not None and told != f"Bearer {self.token}":
            return self.refuse(request, 401, "RepoNotFound")
        if not any(repository == known for known, _ in self.files):
            return self.refuse(request, 404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(request, 404, "RevisionNotFound")
        if content is None:
            return self.refuse(request, 404, "EntryNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_blob_id(content)}"'}
        if len(content) > 1000:  # in git LFS
            where = f"http://localhost:{self.port}/content/{repository.replace('/', '--')}/{path}?signature=x"
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(self.told_size.get(path, len(content))),
                "Location": where,
            }
            return self.respond(request, 302, headers, b"")
        return self.respond(request, 200, headers, content)

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        self.respond(request, status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def respond(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def send(self, request: BaseHTTPRequestHandler, name: str, content: bytes) -> None:
        if name in self.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        start = int(asked[1]) if asked and self.serves_ranges else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if request.command == "HEAD":
            return
        cut = self.cuts.pop(0) if self.cuts else None
        end = len(content) if cut is None else start + cut
        for position in range(start, end, PIECE // 4):
            if self.held is not None and position == start + PIECE:
                self.held.wait()
            request.wfile.write(content[position : min(position + PIECE // 4, end)])
        if cut is not None:
            request.wfile.flush()
            time.sleep(0.5)  # a reset drops what the other side has not read
            # without a farewell, as a router that loses its memory ends a connection
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with small stand-ins for every file of every variant."""
    hub = Hub()
    for files in VARIANTS.values():
        for file in files:
            hub.put(file, f"stand-in for {file.path}".encode())
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def command(hub: Hub, folder: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
        "HF_HOME": str(folder.parent / "hf-home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return [sys.executable, "-m", "hyimg", "download-models", str(folder), *options], environment


def download(hub: Hub, folder: Path, *options: str, **environment: str) -> tuple[int, str, str]:
    words, base = command(hub, folder, *options)
    done = subprocess.run(words, env=base | environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def noise(num_bytes: int) -> bytes:
    return random.Random(1).randbytes(num_bytes)


def test_the_files_come_once_and_the_printed_commands_use_them(hub, model, tmp_path):
    for file in BF16:
        path = model.tokenizer if file is TOKENIZER else getattr(model, str(file.option))
        hub.put(file, path.read_bytes())
    folder = tmp_path / "my models"
    code, out, err = download(hub, folder)
    assert code == 0, err
    assert visible(folder) == sorted(file.name for file in BF16)
    for file in BF16:
        assert (folder / file.name).read_bytes() == hub.files[file.repository, file.path]
    assert load_qwen_tokenizer(None, folder / QWEN.name).source == str(folder / "tokenizer.json")
    assert not list((folder / WORK_FOLDER).glob("*.partial"))

    infer, latents, text, train = (shlex.split(line) for line in out.splitlines())
    assert [line[:2] for line in (infer, latents, text, train)] == [
        ["hyimg", stage] for stage in ("infer", "cache-latents", "cache-text", "train")
    ]
    assert latents[2:4] == ["--vae", str(folder / VAE.name)]
    assert train[2:4] == ["--dit", str(folder / DIT.name)]
    picture = tmp_path / "cat.png"
    infer[infer.index("cat.png")] = str(picture)
    small = ["--image_size", "64", "64", "--infer_steps", "1", "--seed", "1"]
    assert run([*infer[1:], *small]) == 0
    assert picture.is_file()

    before = [(folder / name).stat() for name in visible(folder)]
    hub.requests.clear()
    code, again, err = download(hub, folder)
    assert (code, again) == (0, out)
    assert "all 5 files are complete in" in err
    assert {method for method, *_ in hub.requests} == {"HEAD"}
    after = [(folder / name).stat() for name in visible(folder)]
    assert [(s.st_mtime_ns, s.st_ino) for s in after] == [(s.st_mtime_ns, s.st_ino) for s in before]


@pytest.mark.parametrize("variant", ["fp8", "distilled"])
def test_a_variant_brings_its_own_dit_under_its_own_name(hub, tmp_path, variant):
    code, out, err = download(hub, tmp_path / "m", "--variant", variant)
    assert code == 0, err
    assert visible(tmp_path / "m") == sorted(file.name for file in VARIANTS[variant])
    dit = next(file for file in VARIANTS[variant] if file.option == "dit")
    assert f"--dit {tmp_path / 'm' / dit.name} " in out
    # scales are looked for beside the weights (hyimg.checkpoints.fp8_format)
    scales = {"hunyuanimage2.1_fp8_scale.safetensors"} if variant == "fp8" else set()
    assert scales <= set(visible(tmp_path / "m"))


def test_a_repository_that_was_renamed_is_found(hub, tmp_path):
    new = "Comfy-Org/Another-Name"
    hub.renamed = {VAE.repository: new}
    hub.files |= {(new, path): content for (old, path), content in hub.files.items() if old == VAE.repository}
    large = hub.files[new, VAE.path] = noise(5000)
    code, _, err = download(hub, tmp_path)
    assert code == 0, err
    assert (tmp_path / VAE.name).read_bytes() == large


def test_a_connection_that_breaks_again_and_again_loses_no_more_than_a_piece(hub, tmp_path):
    content = noise(4 * PIECE + 12345)
    hub.put(DIT, content)
    hub.cuts = [PIECE + 5, 2 * PIECE + 7, 1000]
    code, _, err = download(hub, tmp_path)
    assert code == 0, err
    assert err.count(f"the connection to http://127.0.0.1:{hub.port} broke") == 3
    assert (tmp_path / DIT.name).read_bytes() == content
    assert hub.gets(DIT) == [None, f"bytes={PIECE}-", f"bytes={3 * PIECE}-", f"bytes={3 * PIECE}-"]


def test_a_server_that_knows_no_ranges_sends_the_whole_again(hub, tmp_path):
    content = noise(2 * PIECE + 99)
    hub.put(DIT, content)
    hub.cuts, hub.serves_ranges = [PIECE + 5], False
    code, _, err = download(hub, tmp_path)
    assert code == 0, err
    assert (tmp_path / DIT.name).read_bytes() == content


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_download_that_is_stopped_goes_on_where_it_was(hub, tmp_path, number, code):
    content = noise(3 * PIECE)
    hub.put(DIT, content)
    hub.held = threading.Event()
    words, environment = command(hub, tmp_path)
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (partials := list(tmp_path.glob(f"{WORK_FOLDER}/*.partial"))) or not partials[0].stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code
    kept = partials[0].stat().st_size
    if number != signal.SIGKILL:
        assert kept == PIECE
        assert "10.5 MB of hunyuanimage2.1.safetensors are kept" in err
    assert DIT.name not in visible(tmp_path)

    hub.held.set()
    hub.held = None
    hub.requests.clear()
    code, _, err = download(hub, tmp_path)
    assert code == 0, err
    assert hub.gets(DIT) == [f"bytes={kept}-"]
    assert (tmp_path / DIT.name).read_bytes() == content


def test_what_the_hub_does_not_have_or_give_is_said_before_anything_is_made(hub, tmp_path):
    folder = tmp_path / "models"
    del hub.files[VAE.repository, VAE.path]
    for options, words in (
        ((), f"`{VAE.repository}` at http://127.0.0.1:{hub.port} has no file `{VAE.path}`"),
        (("--revision", "v9"), f"`{DIT.repository}` has no revision `v9`"),
        (("--revision", f"{VAE.repository}=v9"), f"`{VAE.repository}` has no revision `v9`"),
        (("--revision", "tencent/Hunyuan=v9"), "did you mean `tencent/HunyuanImage-2.1`"),
        (("--variant", "int8"), "bf16"),
    ):
        code, out, err = download(hub, folder, *options)
        assert (code, out) == (2, ""), err
        assert words in err
    hub.token = "secret"
    code, _, err = download(hub, folder)
    assert code == 2
    assert f"there is no repository `{DIT.repository}`" in err
    assert "--token" in err
    assert "`HF_HUB_OFFLINE` is set" in download(hub, folder, HF_HUB_OFFLINE="1")[2]
    assert not folder.exists()


def test_a_token_is_told_to_the_hub_and_to_nobody_else(hub, tmp_path):
    hub.token = "secret"
    hub.put(DIT, noise(2000))
    code, out, err = download(hub, tmp_path, "--token", "secret")
    assert code == 0, err
    assert "secret" not in out + err
    by_host = {told for _, name, _, told in hub.requests if name.startswith("content of")}
    assert by_host == {None}, "the content comes from another host"


def test_a_hub_that_does_not_answer_is_one_sentence(hub, tmp_path):
    hub.server.shutdown()
    hub.server.server_close()
    code, out, err = download(hub, tmp_path / "m")
    assert (code, out) == (1, "")
    assert f"the connection to http://127.0.0.1:{hub.port} broke" in err
    assert "hint: check the network, and run the same command again" in err
    assert not (tmp_path / "m").exists()


def test_a_disk_with_too_little_room_is_refused_before_the_first_byte(hub, tmp_path):
    hub.put(DIT, noise(2000))
    hub.told_size[DIT.path] = 10**16
    code, out, err = download(hub, tmp_path / "m")
    assert (code, out) == (2, "")
    assert re.search(r"`.*m` has .* free, and 10000\.0 TB must be downloaded", err)
    assert not (tmp_path / "m").exists()


FULL_DISK = """
import errno, os, sys
from hyimg.cache import download
write = download._Counted.write
def no_room(self, data):
    if self.tell():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(self, data)
download._Counted.write = no_room
from hyimg.cli.app import main
main(sys.argv[1:])
"""


def test_a_disk_that_fills_up_meanwhile_is_said_and_nothing_is_lost(hub, tmp_path):
    content = noise(2 * PIECE)
    hub.put(DIT, content)
    words, environment = command(hub, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *words[3:]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"the disk is full: `{DIT.path}` could not be downloaded completely" in done.stderr
    assert visible(tmp_path) == []
    hub.requests.clear()
    code, _, err = download(hub, tmp_path)
    assert code == 0, err
    assert hub.gets(DIT) == [f"bytes={PIECE}-"]
    assert (tmp_path / DIT.name).read_bytes() == content


@pytest.mark.parametrize("num_bytes", [500, 5000])
def test_content_that_has_another_hash_never_gets_its_name(hub, tmp_path, num_bytes):
    """Small files are told by git's hash, large ones by sha256."""
    hub.put(VAE, noise(num_bytes))
    if num_bytes == 500:
        told, hub.respond = (
            hub.respond,
            lambda request, status, headers, body: told(
                request, status, headers, body[:-1] + b"?" if len(body) == 500 else body
            ),
        )
    hub.damaged = {VAE.name}
    code, out, err = download(hub, tmp_path)
    assert (code, out) == (1, "")
    assert f"checksum mismatch for `{VAE.path}` from" in err
    assert VAE.name not in visible(tmp_path)
    hub.damaged = set()
    if num_bytes == 500:
        hub.respond = told
    code, _, err = download(hub, tmp_path)
    assert code == 0, err
    assert (tmp_path / VAE.name).read_bytes() == hub.files[VAE.repository, VAE.path]


def test_files_of_other_content_are_not_replaced_unasked(hub, tmp_path):
    hub.put(VAE, noise(5000))
    for mine in (b"mine", noise(4999) + b"!"):  # of another size, and of the same
        (tmp_path / VAE.name).write_bytes(mine)
        code, _, err = download(hub, tmp_path)
        assert code == 2
        assert f"`{tmp_path / VAE.name}` exists and is not the file of `{VAE.repository}` (" in err
        assert (tmp_path / VAE.name).read_bytes() == mine
        assert not hub.gets(VAE)
    code, _, err = download(hub, tmp_path, "--overwrite")
    assert code == 0, err
    assert (tmp_path / VAE.name).read_bytes() == noise(5000)


def test_what_has_come_of_another_revision_is_not_gone_on_with(hub, tmp_path):
    hub.put(DIT, noise(2 * PIECE))
    stale = tmp_path / WORK_FOLDER / f"{DIT.name}.0123456789ab.partial"
    stale.parent.mkdir()
    stale.write_bytes(bytes(PIECE))
    code, _, err = download(hub, tmp_path)
    assert code == 0, err
    assert hub.gets(DIT) == [None]
    assert not stale.exists()
    assert (tmp_path / DIT.name).read_bytes() == noise(2 * PIECE)


def test_two_downloads_into_one_folder_do_not_mix(hub, tmp_path):
    (tmp_path / WORK_FOLDER).mkdir()
    with FileLock(tmp_path / WORK_FOLDER / "lock"):
        code, _, err = download(hub, tmp_path)
    assert code == 2
    assert "another process is downloading into" in err
    assert visible(tmp_path) == []


def test_nothing_heavy_is_imported_to_download(hub, tmp_path):
    words, environment = command(hub, tmp_path)
    code = (
        "import sys, json\nfrom hyimg.cli.app import run\ncode = run(sys.argv[1:])\n"
        "print(json.dumps([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules]))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words[3:]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_tag_with_slashes_leads_nowhere(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(
        download_stage,
        "look_up",
        lambda repository, path, **_: HubFile(repository, path, "url", 1, "/../../../up"),
    )
    wanted = download_stage._look_up(DIT, tmp_path, "main", None)
    assert wanted.partial.parent == tmp_path / WORK_FOLDER
