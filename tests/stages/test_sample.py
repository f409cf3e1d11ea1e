"""`hyimg sample`: run folders, what is kept, what is rendered again, and runs that were stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from hyimg.config.image_file import read_settings
from hyimg.model.dit import DiT
from hyimg.stages import sample as stage

MODELS = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
QUICK = ["--image_size", "32", "64", "--infer_steps", "2", "--guidance_scale", "1"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red square\na green field --d 3\n", encoding="utf-8")
    return path


@pytest.fixture
def sample(hyimg, tmp_path, prompts):
    """Runs `sample` into one folder and gives what was said."""

    def call(*extra, code=0):
        arguments = [*MODELS, *QUICK, "--prompts", prompts, "--output_dir", tmp_path / "out", *extra]
        got, _, err = hyimg("sample", *arguments)
        assert got == code, err
        return err

    return call


@pytest.fixture
def renders(monkeypatch):
    """The number of images rendered: the model is called twice for each (two steps, no guidance)."""
    calls = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return lambda: len(calls) / 2


def files(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_run_folder_gives_each_checkpoint_once_in_the_order_of_training(sample, trained, tmp_path):
    labels = ["base", "lora-step00000003", "lora-000001", "lora-step00000006", "lora"]
    sample("--run", trained)
    by_run = files(tmp_path / "out")
    names = {f"{row:03}-{label}.png" for row in (1, 2) for label in labels}
    assert set(by_run) == names | {"sheet.png"}
    # as a LoRA file's neighbour, or as its value, a folder means the same
    said = sample("--lora_weight", trained)
    assert "10 images kept" in said
    assert files(tmp_path / "out").keys() == by_run.keys()


def test_columns_stand_in_the_order_of_training(sample, trained, monkeypatch):
    shown = []
    monkeypatch.setattr(
        stage, "contact_sheet", lambda tiles, rows, columns: shown.extend(columns) or tiles[0][0]
    )
    sample("--run", trained, "--no_base")
    # 4 steps an epoch
    assert shown == ["lora-step00000003", "lora-000001", "lora-step00000006", "lora"]


def test_what_is_there_is_kept_with_its_seed_and_only_what_is_new_is_rendered(
    sample, renders, trained, tmp_path, prompts
):
    lora = trained / "lora.safetensors"
    sample()
    assert renders() == 2
    before = files(tmp_path / "out")
    said = sample("--lora_weight", lora)
    assert renders() == 4
    assert "2 images kept" in said
    after = files(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name != "sheet.png")
    assert after["sheet.png"] != before["sheet.png"]
    seeds = {read_settings(tmp_path / "out" / f"001-{label}.png")["seed"] for label in ("base", "lora")}
    assert len(seeds) == 1, "the prompt names no seed, and its row has one"
    prompts.write_text(prompts.read_text() + "a dog --d 1\n", encoding="utf-8")
    sample("--lora_weight", lora)
    assert renders() == 6


def test_other_settings_are_rendered_again_and_never_mixed_in(sample, renders, trained, tmp_path):
    lora = tmp_path / "cat.safetensors"
    shutil.copyfile(trained / "lora-000001.safetensors", lora)
    sample("--lora_weight", lora)
    before = files(tmp_path / "out")
    # the file has been trained further
    shutil.copyfile(trained / "lora.safetensors", lora)
    said = sample("--lora_weight", lora)
    assert renders() == 4 + 2
    assert "2 images kept" in said
    assert "rendered again: 001-cat.png, 002-cat.png, made with other `loras`" in said
    after = files(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {
        "001-cat.png",
        "002-cat.png",
        "sheet.png",
    }
    said = sample("--lora_weight", lora, "--infer_steps", "1")
    assert "made with other `infer_steps`" in said
    steps = {read_settings(path)["infer_steps"] for path in (tmp_path / "out").glob("00*.png")}
    assert steps == {1}


def test_a_picture_that_is_cut_short_is_rendered_again(sample, renders, tmp_path):
    sample()
    picture = tmp_path / "out" / "002-base.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) * 2 // 3])
    assert "1 image kept" in sample()
    assert renders() == 2 + 1
    assert picture.read_bytes() == whole


def test_a_picture_of_somebody_else_is_not_replaced(sample, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "002-base.png")
    before = files(tmp_path / "out")
    said = sample(code=2)
    assert "002-base.png` is not a picture of `hyimg sample`" in said
    assert files(tmp_path / "out") == before


def test_one_process_at_a_time_renders_into_a_folder(sample, tmp_path):
    lock = FileLock(tmp_path / "out" / stage.LOCK_NAME)
    (tmp_path / "out").mkdir()
    with lock:
        assert "another process is rendering into" in sample(code=2)
    sample()
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == [
        "001-base.png",
        "002-base.png",
        "sheet.png",
    ]


def test_loras_of_one_name_are_told_apart(sample, trained, tmp_path):
    for run in ("cat", "dog"):
        (tmp_path / run).mkdir()
        shutil.copyfile(trained / "lora.safetensors", tmp_path / run / "lora.safetensors")
    lora = tmp_path / "cat" / "lora.safetensors"
    sample("--lora_weight", lora, tmp_path / "dog" / "lora.safetensors")
    assert (tmp_path / "out" / "001-dog-lora.png").exists()
    sample("--lora_weight", lora, lora, "--lora_multiplier", "0.5", "1")
    assert (tmp_path / "out" / "001-lora@0.5.png").exists()
    said = sample("--lora_weight", lora, lora, "--lora_multiplier", "0.25")
    assert f"`--lora_multiplier` has 1 value for 2 LoRA files: 1 for `{lora}`" in said
    assert (tmp_path / "out" / "001-lora@0.25.png").exists()
    # a folder's multiplier is that of all its checkpoints
    said = sample("--run", trained, "--lora_multiplier", "0.125", "--output_dir", tmp_path / "run")
    assert "1 for" not in said
    pictures = list((tmp_path / "run").glob("001-lora*.png"))
    assert len(pictures) > 1
    assert {read_settings(path)["loras"][0]["multiplier"] for path in pictures} == {0.125}
    said = sample("--lora_weight", lora, lora, code=2)
    assert "two columns would be named `lora`" in said


def test_a_run_that_was_killed_goes_on_where_it_was(
    sample, renders, trained, tmp_path, prompts, model, monkeypatch
):
    """Killed while it renders, then while it decodes; the end is that of a run that was not."""
    prompts.write_text("a red square --d 1\na green field --d 3\n", encoding="utf-8")
    sample("--lora_weight", trained / "lora.safetensors")
    whole = {name: data for name, (data, _) in files(tmp_path / "out").items()}
    shutil.rmtree(tmp_path / "out")
    assert renders() == 4

    class KilledError(BaseException):
        pass

    def after(count, function):
        def call(*arguments, **options):
            nonlocal count
            count -= 1
            if count < 0:
                raise KilledError
            return function(*arguments, **options)

        return call

    for name, count in (("write_latent", 3), ("save_png", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(stage, name, after(count, getattr(stage, name)))
            with pytest.raises(KilledError):
                sample("--lora_weight", trained / "lora.safetensors")
    # three were rendered and waited, one was rendered twice
    assert renders() == 4 + 4 + 1
    assert len(list((tmp_path / "out").glob("00*.png"))) == 2
    said = sample("--lora_weight", trained / "lora.safetensors")
    assert renders() == 9
    assert "2 images kept" in said
    assert {name: data for name, (data, _) in files(tmp_path / "out").items()} == whole


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_images_appear_whole_or_not_at_all_whenever_it_is_killed(trained, tmp_path, prompts, model):
    prompts.write_text("a red square --d 1\na green field --d 3\na dog --d 4\n", encoding="utf-8")
    command = [sys.executable, "-m", "hyimg", "sample", "--run", str(trained), "--prompts", str(prompts)]
    for option, path in model.files().items():
        command += [f"--{option}", str(path)]
    command += ["--image_size", "64", "64", "--infer_steps", "4", "--output_dir", str(tmp_path / "out")]
    num_kills = 0
    while True:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = sum(1 for _ in (tmp_path / "out").rglob("*.*")) if (tmp_path / "out").exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            there = sum(1 for _ in (tmp_path / "out").rglob("*.*")) if (tmp_path / "out").exists() else 0
            if there >= before + 2:
                break
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        num_kills += 1
        for path in (tmp_path / "out").glob("[!.]*.png"):
            np.asarray(Image.open(path))
            assert read_settings(path) is not None or path.name == "sheet.png"
        assert num_kills < 60
    assert process.returncode == 0
    assert num_kills > 2
    assert len(list((tmp_path / "out").glob("00*.png"))) == 15
