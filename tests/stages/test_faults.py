"""Faults put into the caching stages, through the real commands: nothing wrong is ever used, and the next run
makes exactly what is missing.

Commands that are to be killed run in processes of a fork server that has torch loaded, so that a kill falls
into the work and not into the imports.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyimg.cache.atomic import TEMPORARY_SUFFIX
from hyimg.cache.index import INDEX_NAME
from hyimg.cache.latents import LatentStore
from hyimg.cache.prompt_embeddings import TextStore
from hyimg.cli import app
from hyimg.cli.app import main, run

STAGES = ["latents", "text"]
STORES = {"latents": LatentStore, "text": TextStore}
NUM_IMAGES = 24

needs_processes = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is used on Linux only")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A dataset file over 24 small pictures with captions of their own; its caches are empty."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "images").mkdir()
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        caption = f"picture number {number}" + (f' with the word "{number}"' if number % 3 else "")
        (folder / "images" / f"{number}.txt").write_text(caption, encoding="utf-8")
    path = folder / "data.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def cold(source, tmp_path) -> Path:
    """A copy of that dataset without caches."""
    shutil.copytree(source.parent, tmp_path / "cold")
    return tmp_path / "cold" / "data.toml"


@pytest.fixture(scope="module")
def undisturbed(source, model, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The bytes of every entry that the two stages make, by stage and place."""
    folder = tmp_path_factory.mktemp("undisturbed") / "set"
    shutil.copytree(source.parent, folder)
    common = ["--dataset_config", str(folder / "data.toml")]
    encoders = ["--text_encoder", str(model.text_encoder), "--byt5", str(model.byt5)]
    encoders += ["--text_encoder_batch_size", "1"]  # as `fill` has it
    assert run(["cache-latents", *common, "--vae", str(model.vae)]) == 0
    assert run(["cache-text", *common, *encoders]) == 0
    return {stage: contents(folder / "hyimg-cache", stage) for stage in STAGES}


def contents(cache: Path, stage: str) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in (cache / stage).glob("*/*/*.safetensors")}


def made_and_kept(err: str) -> tuple[int, int]:
    """What a caching command says it has done."""
    if whole := re.search(r"all (\d+) ", err):
        return 0, int(whole[1])
    found = re.search(r"(\d+)(?: prompts?)? made in .* (\d+) kept", err)
    assert found is not None, err
    return int(found[1]), int(found[2])


@pytest.fixture(scope="module")
def server():
    """Starts command lines in fresh processes that have their imports done."""
    context = multiprocessing.get_context("forkserver")
    stages = ["hyimg.stages.cache_latents", "hyimg.stages.cache_text"]
    context.set_forkserver_preload(["hyimg.cli.app", *stages, "transformers.models.t5.modeling_t5"])

    def start(arguments: list[str]):
        process = context.Process(target=main, args=(arguments,))
        process.start()
        return process

    start(["--version"]).join(120)
    return start


def duration(server, arguments: list[str]) -> float:
    started = time.monotonic()
    process = server(arguments)
    process.join(120)
    assert process.exitcode == 0
    return time.monotonic() - started


def kill_and_repair(server, hyimg, arguments, dataset, stage, right, moment, whole) -> tuple[int, int]:
    """Kills a command at a moment, looks at what it left, lets the next run finish the work.

    Moments below 1 are parts of the time `whole` that the command takes; one above is so many entries made.
    Returns how many entries the killed command had made, and 1 if it was killed rather than done.
    """
    cache = dataset.parent / "hyimg-cache"
    shutil.rmtree(cache, ignore_errors=True)
    process = server(arguments)
    if moment < 1:
        process.join(moment * whole)
    while moment >= 1 and process.is_alive() and len(contents(cache, stage)) < moment:
        pass
    process.kill()
    process.join()
    left = contents(cache, stage)
    assert left.items() <= right.items()  # whole and right, each of them
    code, _, err = hyimg(*arguments)
    assert code == 0, err
    assert made_and_kept(err) == (len(right) - len(left), len(left))
    assert "damaged" not in err
    assert contents(cache, stage) == right
    return len(left), int(process.exitcode != 0)


@needs_processes
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_at_any_moment_leaves_whole_entries_and_the_next_makes_the_rest(
    server, hyimg, fill, cold, undisturbed, stage
):
    arguments = fill(stage, cold)
    whole = duration(server, arguments)
    told = [
        kill_and_repair(server, hyimg, arguments, cold, stage, undisturbed[stage], moment, whole)
        for moment in (0.2, 0.5, 0.8, 1, 8, 20)
    ]
    assert sum(killed for _, killed in told) >= 3


@needs_processes
@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_hundred_kills(server, hyimg, fill, cold, undisturbed, stage, capsys):
    arguments = fill(stage, cold)
    whole = duration(server, arguments)
    draw = random.Random(0)
    moments = [draw.choice([draw.uniform(0.1, 1), draw.randint(1, 24)]) for _ in range(100)]
    told = [
        kill_and_repair(server, hyimg, arguments, cold, stage, undisturbed[stage], moment, whole)
        for moment in moments
    ]
    with capsys.disabled():
        partly = sum(0 < left < len(undisturbed[stage]) for left, _ in told)
        print(f"\n{stage}: {sum(k for _, k in told)} killed of 100, {partly} with part of the entries made")
    assert sum(killed for _, killed in told) >= 50


@needs_processes
@pytest.mark.parametrize("stage", STAGES)
def test_two_commands_fill_one_cache_at_once(server, hyimg, fill, cold, undisturbed, stage):
    processes = [server(fill(stage, cold)) for _ in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert contents(cold.parent / "hyimg-cache", stage) == undisturbed[stage]
    _, _, err = hyimg(*fill(stage, cold, "--verify"))
    assert made_and_kept(err) == (0, len(undisturbed[stage]))
    assert not list(cold.parent.rglob(f"*{TEMPORARY_SUFFIX}"))


@contextlib.contextmanager
def mounted(folder: Path, *options: str):
    """A mount for the time of a block; skips where it is not permitted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        # lazily: an index may be open until it is collected
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount") or sys.platform != "linux", reason="needs Linux's mount")
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_said_and_what_was_written_is_whole(hyimg, fill, cold, undisturbed, stage, tmp_path):
    right = undisturbed[stage]
    with mounted(tmp_path / "large", "-t", "tmpfs", "-o", "size=20m", "none") as disk:
        assert hyimg(*fill(stage, cold, "--cache_dir", disk))[0] == 0
        free = os.statvfs(disk)
        used = (free.f_blocks - free.f_bfree) * free.f_frsize
    half_of_the_entries = sum(-(-len(data) // 4096) * 4096 for data in right.values()) // 2
    size = f"size={used - half_of_the_entries}"
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", size, "none") as disk:
        code, _, err = hyimg(*fill(stage, cold, "--cache_dir", disk))
        assert code == 1
        assert "error: the disk is full: " in err
        left = contents(disk, stage)
        assert left.items() < right.items()
        assert left
        assert not list(disk.rglob(f"*{TEMPORARY_SUFFIX}"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        code, _, err = hyimg(*fill(stage, cold, "--cache_dir", disk))
        assert code == 0
        assert made_and_kept(err) == (len(right) - len(left), len(left))
        assert contents(disk, stage) == right


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_write_that_finds_no_room_is_said_and_leaves_nothing_half(
    hyimg, fill, cold, undisturbed, stage, place, monkeypatch
):
    written = 0
    write = Path.write_bytes

    def write_bytes(self: Path, data: bytes) -> int:
        nonlocal written
        if self.name.endswith(TEMPORARY_SUFFIX) and len(self.parent.name) == 2:  # an entry's folder
            written += 1
            if written > place:
                write(self, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write_bytes)
        code, _, err = hyimg(*fill(stage, cold))
    assert code == 1
    assert "error: the disk is full: " in err
    cache = cold.parent / "hyimg-cache"
    assert len(contents(cache, stage)) == place
    assert not list(cache.rglob(f"*{TEMPORARY_SUFFIX}"))
    _, _, err = hyimg(*fill(stage, cold))
    assert made_and_kept(err) == (len(undisturbed[stage]) - place, place)
    assert contents(cache, stage) == undisturbed[stage]


@contextlib.contextmanager
def read_only(folder: Path):
    """Nothing in `folder` can be written for the time of a block, not even by root."""
    if os.getuid() == 0:
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            yield
        return
    places = [folder, *folder.rglob("*")]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in places:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_a_read_only_cache_is_trained_from_and_the_stages_say_that_it_is(
    hyimg, fill, entries, own_dataset, tmp_path
):
    train = ["train", "--dit", "{dit}", "--dataset_config", own_dataset, "--max_train_steps", "2"]
    with read_only(own_dataset.parent / "hyimg-cache"):
        code, _, err = hyimg(*train, "--output_dir", tmp_path / "run")
        assert code == 0, err
        assert (tmp_path / "run" / "lora.safetensors").exists()
        for stage in STAGES:
            code, _, err = hyimg(*fill(stage, own_dataset))
            assert code == 0, err
            assert made_and_kept(err) == (0, len(entries(own_dataset, stage)))
        (own_dataset.parent / "images" / "2.txt").write_text("another caption", encoding="utf-8")
        code, _, err = hyimg(*fill("text", own_dataset))
        assert code == 2
        assert "error: cannot write in the folder" in err
        code, _, err = hyimg(*train, "--output_dir", tmp_path / "second")
        assert code == 2
        assert "no text cache for the prompt `another caption`" in err


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 16
    path.write_bytes(data)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "somebody's.txt").write_text("kept", encoding="utf-8")


def replace_by_another_entry(path: Path) -> None:
    other = next(p for p in sorted(path.parents[1].glob("*/*.safetensors")) if p != path)
    shutil.copy(other, path)


def replace_by_a_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


DAMAGES = [truncate, empty, flip_a_bit, replace_by_a_folder, replace_by_another_entry]


@pytest.mark.parametrize("damage", [*DAMAGES, replace_by_a_broken_link], ids=lambda d: d.__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_entry_is_never_used_and_made_again_alone(
    hyimg, fill, entries, own_dataset, tmp_path, stage, damage
):
    cache = own_dataset.parent / "hyimg-cache"
    right = contents(cache, stage)
    spoilt = entries(own_dataset, stage)[1:4:2]
    for path in spoilt:
        damage(path)
    run_dir = tmp_path / "run"
    code, _, err = hyimg("train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", run_dir)
    assert code == 2
    assert f"hint: run `hyimg cache-{stage} --dataset_config {own_dataset}`" in err
    assert not list(run_dir.rglob("*.safetensors"))
    code, _, err = hyimg(*fill(stage, own_dataset))
    assert code == 0, err
    assert made_and_kept(err) == (2, len(right) - 2)
    if damage is not replace_by_a_broken_link:  # which counts as missing
        assert "warning: 2 entries are damaged and will be made again:" in err
    assert contents(cache, stage) == right
    kept = list(cache.rglob("somebody's.txt"))
    assert len(kept) == (2 if damage is replace_by_a_folder else 0)
    assert made_and_kept(hyimg(*fill(stage, own_dataset))[2]) == (0, len(right))


def rubbish(path: Path) -> None:
    path.write_bytes(b"rubbish" * 4000)


def remove(path: Path) -> None:
    path.unlink()


def spoil_behind_the_first_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\x99" * (len(data) - 4096))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "damage",
    [remove, rubbish, truncate, empty, spoil_behind_the_first_page, flip_a_bit, replace_by_a_folder],
    ids=lambda d: d.__name__,
)
def test_an_index_that_is_lost_or_damaged_costs_time_only(
    hyimg, fill, own_dataset, stage, damage, monkeypatch
):
    cache = own_dataset.parent / "hyimg-cache"
    right = contents(cache, stage)
    hyimg(*fill(stage, own_dataset))
    gc.collect()  # closes that run's connection, which would write its memory over the damage
    for suffix in ("-wal", "-shm"):
        (cache / f"{INDEX_NAME}{suffix}").unlink(missing_ok=True)
    damage(cache / INDEX_NAME)
    code, _, err = hyimg(*fill(stage, own_dataset))
    assert code == 0, err
    assert made_and_kept(err) == (0, len(right))
    if damage in (rubbish, spoil_behind_the_first_page):
        assert "warning: the index in" in err
    assert contents(cache, stage) == right
    if damage is replace_by_a_folder:
        return
    # and it is a memory again: a warm run reads no entry
    reads = []
    monkeypatch.setattr(STORES[stage], "read_verified", lambda self, key: reads.append(key))
    hyimg(*fill(stage, own_dataset))
    assert reads == []


def test_a_lost_word_on_the_model_is_written_again(hyimg, fill, own_dataset, tmp_path):
    cache = own_dataset.parent / "hyimg-cache"
    (word,) = (cache / "latents").glob("*/model.json")
    right = word.read_bytes()
    for spoilt in (b"", b"{", None):
        if spoilt is None:
            word.unlink()
        else:
            word.write_bytes(spoilt)
        assert made_and_kept(hyimg(*fill("latents", own_dataset))[2])[0] == 0
        assert word.read_bytes() == right


def test_an_edit_encodes_again_exactly_what_it_affects(hyimg, model, fill, own_dataset, tmp_path):
    images = own_dataset.parent / "images"

    def made(**files) -> tuple[int, int]:
        """How many latents and prompts the two commands make."""
        vae = ("--vae", files["vae"]) if "vae" in files else ()
        errs = [hyimg(*fill("latents", own_dataset, *vae))[2], hyimg(*fill("text", own_dataset))[2]]
        return made_and_kept(errs[0])[0], made_and_kept(errs[1])[0]

    def edit(old: str, new: str) -> None:
        text = own_dataset.read_text(encoding="utf-8")
        assert old in text
        own_dataset.write_text(text.replace(old, new), encoding="utf-8")

    assert made() == (0, 0)
    picture = Image.open(images / "1.png")
    picture.rotate(180).save(images / "1.png")
    assert made() == (1, 0)
    (images / "2.txt").write_text("an edited caption", encoding="utf-8")
    assert made() == (0, 1)
    (images / "0.png").rename(images / "renamed.png")
    (images / "0.txt").rename(images / "renamed.txt")
    assert made() == (0, 0)
    edit("num_repeats = 1", "num_repeats = 3\n  caption_dropout_rate = 0.5")
    assert made() == (0, 0)
    edit("batch_size = 2", "batch_size = 1")
    assert made() == (0, 0)
    edit("num_repeats = 3", "num_repeats = 3\n  flip_aug = true")
    assert made() == (5, 0)
    edit("flip_aug = true", "flip_aug = true\n  caption_prefix = 'photo, '")
    assert made() == (0, 5)
    edit("resolution = 128", "resolution = 96")
    assert made() == (10, 0)
    edit("resolution = 96", "resolution = 128")
    assert made() == (0, 0)  # what was made before is still there
    other = tmp_path / "other.safetensors"
    data = bytearray(model.vae.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert made(vae=other) == (10, 0)
    assert made() == (0, 0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("command", ["cache-latents", "cache-text", "infer", "sample"])
def test_a_closed_terminal_leaves_no_temporary_file(
    hyimg, own_dataset, model, tmp_path, monkeypatch, command
):
    """SIGHUP comes twice, from the kernel and from the shell, between writing a file and giving it its name."""
    monkeypatch.setattr(app, "_last_signal", None)
    shutil.rmtree(own_dataset.parent / "hyimg-cache")
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    models = ["--dit", "{dit}", "--vae", "{vae}"]
    encoders = ["--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]
    quick = ["--image_size", "32", "64", "--infer_steps", "1", "--guidance_scale", "1"]
    arguments = {
        "cache-latents": ["--dataset_config", own_dataset, "--vae", "{vae}"],
        "cache-text": ["--dataset_config", own_dataset, *encoders],
        "infer": [*models, *encoders, *quick, "--prompt", "a cat", "--save_path", tmp_path / "out"],
        "sample": [
            *models,
            *encoders,
            *quick,
            "--prompts",
            tmp_path / "prompts.txt",
            "--output_dir",
            tmp_path / "out",
        ],
    }[command]
    replace, waiting = os.replace, []

    def interrupted(source, target):
        if not waiting and Path(target).suffix in (".safetensors", ".png"):
            waiting.append(Path(source).is_file())
            try:
                app._terminate(signal.SIGHUP, None)
            finally:
                app._terminate(signal.SIGHUP, None)  # while the first one unwinds
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        code, _, err = hyimg(command, *arguments)
    assert (code, waiting) == (129, [True])
    assert "error: terminated" in err
    assert [path for path in tmp_path.rglob("*") if TEMPORARY_SUFFIX in path.name] == []
    assert hyimg(command, *arguments)[0] == 0
