"""Commands that are killed at each of their file operations: the same line, given again, ends as if nothing had been.

A process counts what it does to the folder (an audit hook sees every file that is opened for writing, renamed, linked,
cut or removed, and every folder that is made or removed) and sends itself SIGKILL before a given one. Whatever a kill
can leave on the disk is left by one of these, but for what lies in a file that is not yet closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from hyimg.cli.app import run
from hyimg.stages.make_tiny_model import ModelFolder
from hyimg.training import saving
from hyimg.training.metrics import COST_FIELDS
from tests.stages.conftest import model as model
from tests.training.conftest import fill_caches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the commands run in forks, as on Linux only")

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def run_until(arguments: list[str], folder: str, moment: int, outcome: Path, said: Path) -> None:
    """A command line in this process, killed before change number `moment` of the folder; 0 kills it never.

    Its exit code and the number of changes are written to `outcome`, what it says to `said`.
    """
    sys.stdout = sys.stderr = said.open("w", encoding="utf-8", buffering=1)
    count = 0

    def watch(event: str, found: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            changes = isinstance(found[2], int) and bool(found[2] & WRITES)
        else:
            changes = event in CHANGES
        # a descriptor, or a name that is relative to one, is of a folder that is being removed
        if changes and (not os.path.isabs(str(found[0])) or str(found[0]).startswith(folder)):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    code = run(arguments)
    outcome.write_text(json.dumps([code, count]), encoding="utf-8")


class Ended(NamedTuple):
    """A command line's exit code, None where it was killed, the number of its changes, and what it said."""

    code: int | None
    changes: int
    said: str


Start = Callable[..., Ended]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs a command line in a fork of this process, which has the imports done."""
    folder = tmp_path_factory.mktemp("outcome")
    outcome, said = folder / "outcome.json", folder / "said.txt"

    def call(arguments: list[str], changed: Path, moment: int = 0) -> Ended:
        outcome.unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            try:
                run_until(arguments, str(changed), moment, outcome, said)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        words = said.read_text(encoding="utf-8")
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, words
            return Ended(None, moment, words)
        assert outcome.exists(), words
        return Ended(*json.loads(outcome.read_text(encoding="utf-8")), words)

    return call


# ---- what is compared


def contents(folder: Path) -> dict[str, object]:
    """Every file below the folder, and every empty folder, by its path; without what is of the hour or drawn."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = re.sub(r"-[0-9a-f]{8}(?=\.(safetensors|json)$)", "", str(path.relative_to(folder)))
        assert name not in found, f"two of {name}"
        if path.name.endswith((".sqlite-wal", ".sqlite-shm")):
            continue  # the process ends without closing the index
        if path.is_file():
            found[name] = content(path)
        elif not any(path.iterdir()):
            found[name] = None
    return found


def content(path: Path) -> object:
    if path.name.endswith(".metrics.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in lines]
    if path.parent.name.endswith("-state") and path.suffix == ".json":
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "manifest.json":
            return sorted(name for name in values["files"])
        return {k: v for k, v in values.items() if k not in ("saved", "started", "log_name", "metrics")}
    if path.suffix == ".sqlite":
        with sqlite3.connect(path) as database:
            tables = [
                row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            ]
            return {table: database.execute(f"SELECT count(*) FROM {table}").fetchone() for table in tables}
    return path.read_bytes()


# ---- the commands


class Case(NamedTuple):
    """A command line that changes `folder`, which holds what was in `before` (nothing where that is None).

    One that `adds` makes new files each time it is given, so also after a kill that came when it had made all.
    """

    arguments: list[str]
    folder: Path
    before: Path | None = None
    adds: bool = False


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crash")


@pytest.fixture(scope="module")
def dataset(work: Path, model: ModelFolder) -> Path:
    """The dataset file of four small images, with caches of random numbers."""
    images = work / "data" / "images"
    images.mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("cat" * (number + 1), encoding="utf-8")
    path = work / "data" / "data.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\n", encoding="utf-8"
    )
    fill_caches(path, model, model)
    return path


def training(model: ModelFolder, dataset: Path, *extra: object) -> list[object]:
    return [
        *("train", "--dit", model.dit, "--dataset_config", dataset),
        *"--max_train_steps 5 --seed 7 --network_dim 2 --no_metadata --max_data_loader_n_workers 0".split(),
        *("--mixed_precision", "no", "--device", "cpu", *extra),
    ]


RENDERING = "--image_size 64 64 --infer_steps 1 --guidance_scale 1 --mixed_precision no --device cpu".split()
STATES = "--save_every_n_steps 2 --save_every_n_epochs 1 --save_last_n_steps 1 --save_state --resume latest".split()


@pytest.fixture(scope="module")
def earlier(work: Path, model: ModelFolder, dataset: Path) -> Path:
    """The run folder of a training that was not killed."""
    folder = work / "earlier"
    line = training(model, dataset, "--output_dir", folder, "--save_state", "--save_every_n_steps", 2)
    assert run([str(word) for word in line]) == 0
    return folder


@pytest.fixture(scope="module")
def case(work: Path, model: ModelFolder, dataset: Path, earlier: Path) -> Callable[[str], Case]:
    """The command lines by name."""

    def caching(stage: str, *files: object) -> Case:
        before = work / "uncached"
        if not before.is_dir():
            shutil.copytree(dataset.parent, before, ignore=shutil.ignore_patterns("hyimg-cache"))
        folder = work / "dataset"
        return Case([stage, "--dataset_config", folder / "data.toml", *files], folder, before)

    out, data, lora = work / "out", dataset, earlier / "lora.safetensors"
    encoders = ["--text_encoder", model.text_encoder, "--byt5", model.byt5]
    rendering = ["--dit", model.dit, "--vae", model.vae, *encoders, *RENDERING]
    prompts = work / "prompts.txt"
    prompts.write_text("a red square --d 1\na cat --d 2\n", encoding="utf-8")
    commands: dict[str, Callable[[], Case]] = {
        "train": lambda: Case(training(model, data, "--output_dir", out, *STATES), out),
        "train again": lambda: Case(
            training(model, data, "--output_dir", out, "--overwrite", "--save_format", "comfy"), out, earlier
        ),
        "cache-latents": lambda: caching("cache-latents", "--vae", model.vae),
        "cache-text": lambda: caching("cache-text", *encoders, "--text_encoder_batch_size", 1),
        "convert-comfy": lambda: Case(["convert-comfy", lora, out / "c.safetensors", "--overwrite"], out),
        "merge": lambda: Case(["merge", lora, lora, "-o", out / "m.safetensors", "--overwrite"], out),
        "make-tiny-model": lambda: Case(["make-tiny-model", out, "--overwrite"], out),
        "dataset": lambda: Case(["dataset", data, "--contact_sheet", out / "s.png"], out),
        "infer": lambda: Case(
            ["infer", *rendering, "--from_file", prompts, "--save_path", out], out, adds=True
        ),
        "sample": lambda: Case(
            ["sample", *rendering, "--lora_weight", lora, "--prompts", prompts, "--output_dir", out], out
        ),
    }
    return lambda name: commands[name]()


COMMANDS = [
    *("train", "train again", "cache-latents", "cache-text", "convert-comfy", "merge", "make-tiny-model"),
    *("dataset", "infer", "sample"),
]


def check_points(case: Case, start: Start, choose: Callable[[int], Iterable[int]]) -> int:
    """Kills the line at the chosen ones of its changes, each time in a fresh folder, and gives it again; the number."""
    arguments = [str(word) for word in case.arguments]

    def afresh() -> None:
        shutil.rmtree(case.folder, ignore_errors=True)
        if case.before is not None:
            shutil.copytree(case.before, case.folder)

    afresh()
    undisturbed = start(arguments, case.folder)
    assert undisturbed.code == 0, undisturbed.said
    once = contents(case.folder)
    if case.adds:
        assert start(arguments, case.folder).code == 0
    twice = contents(case.folder)
    moments = list(choose(undisturbed.changes))
    for moment in moments:
        afresh()
        assert start(arguments, case.folder, moment).code is None
        left = sorted(contents(case.folder))
        # what `infer` has not finished has a record
        had_ended = once.keys() <= set(left) and not any(name.endswith("/job.json") for name in left)
        expected = twice if case.adds and had_ended else once
        again = start(arguments, case.folder)
        assert again.code == 0, f"killed before change {moment}, which left {left}: {again.said}"
        found = contents(case.folder)
        assert sorted(found) == sorted(expected), f"killed before change {moment}"
        assert [name for name in found if found[name] != expected[name]] == [], moment
    return len(moments)


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_at_any_change_ends_the_same_when_it_is_given_again(
    case: Callable[[str], Case], start: Start, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = check_points(case(name), start, lambda changes: range(1, changes + 1))
    with capsys.disabled():
        print(f"\n{name}: killed at each of {number} changes")


@pytest.mark.parametrize(("name", "number"), [("train", 4), ("train again", 1), ("convert-comfy", 1)])
def test_a_command_that_is_killed_at_some_changes(
    case: Callable[[str], Case], start: Start, name: str, number: int
) -> None:
    draw = random.Random(name)
    assert (
        check_points(case(name), start, lambda changes: draw.sample(range(1, changes + 1), number)) == number
    )


# ---- a full disk


class Filled(NamedTuple):
    """What came of a command line on a small disk, and again once there was room; what was wrong afterwards."""

    first: Ended
    again: Ended
    wrong: list[str]


def on_a_full_disk(
    case: Case, start: Start, size: int, expected: dict[str, object], *, unchecked: bool
) -> Filled:
    """The line on a disk of `size` bytes, and again on a large one, in a fork that alone sees that disk.

    With `unchecked` the file system does not say what is free, so that writes fail rather than be refused.
    """
    arguments = [str(word) for word in case.arguments]
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.mkdir()
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(0x20000):  # CLONE_NEWNS
                raise OSError(ctypes.get_errno(), "unshare")
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            mount = ["mount", "-t", "tmpfs", "tmpfs", str(case.folder), "-o"]
            subprocess.run([*mount, f"size={size}"], check=True)
            if unchecked:
                saving.free_bytes = lambda folder: None  # type: ignore[assignment]
            first = start(arguments, case.folder)
            subprocess.run([*mount, "remount,size=1g"], check=True)
            again = start(arguments, case.folder)
            found = contents(case.folder)
            wrong = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
            os.write(writes, json.dumps([first, again, wrong]).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    if not told:
        pytest.skip("a file system can be mounted by root only")
    first, again, wrong = json.loads(told)
    return Filled(Ended(*first), Ended(*again), wrong)


def check_full_disks(case: Case, start: Start, shares: Iterable[float]) -> int:
    """The line on disks of these shares of what it takes; gives how many were too small."""
    shutil.rmtree(case.folder, ignore_errors=True)
    assert start([str(word) for word in case.arguments], case.folder).code == 0
    expected = contents(case.folder)
    whole = sum(path.stat().st_size for path in case.folder.rglob("*") if path.is_file())
    failed = 0
    for number, share in enumerate(shares):
        filled = on_a_full_disk(case, start, int(share * whole), expected, unchecked=number % 2 == 0)
        if filled.first.code != 0:
            failed += 1
            assert filled.first.code == 1, filled.first.said
            assert "unexpected" not in filled.first.said
            assert re.search(r"disk is (too )?full|No space left", filled.first.said), filled.first.said
        assert filled.again.code == 0, (
            f"after {share} of what it takes: {filled.first.said}\n{filled.again.said}"
        )
        assert filled.wrong == [], share
    return failed


def test_a_run_that_finds_the_disk_full_ends_the_same_once_there_is_room(
    case: Callable[[str], Case], start: Start
) -> None:
    assert check_full_disks(case("train"), start, [0.2, 0.6]) == 2


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in ("train again", "cache-latents", "cache-text")]
)
def test_a_command_that_finds_the_disk_full_at_any_size(
    case: Callable[[str], Case], start: Start, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = check_full_disks(case(name), start, [part / 20 for part in range(1, 22)])
    with capsys.disabled():
        print(f"\n{name}: {failed} disks were too small")
