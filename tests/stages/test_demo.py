"""`hyimg demo`, as a user runs it, what its LoRA has learnt, and a dry run at the true depth. Minutes long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from benchmarks.micro.proof import PROOF, prove
from hyimg.demo import concept
from hyimg.demo.concept import NUM_KNOWN, NUM_PICTURES, WEIGHTS, DemoFolder
from hyimg.report import SilentReporter
from hyimg.stages.demo import COMMANDS

HYIMG = [sys.executable, "-m", "hyimg"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[DemoFolder, str]:
    """The folder of a demo that was run to its end, and what it printed."""
    folder = DemoFolder(tmp_path_factory.mktemp("demo") / "a folder with blanks")
    done = subprocess.run([*HYIMG, "demo", folder.directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.mark.long
def test_the_demo_ends_in_pictures_and_a_lora(demo):
    folder, printed = demo
    for command in COMMANDS:
        assert f"$ hyimg {command.split()[0]} " in printed
    assert "warning" not in printed
    assert str(folder.sheet) in printed.splitlines()[-1]
    sheet = Image.open(folder.sheet)
    assert sheet.width > 3 * 128
    assert sheet.height > 4 * 128
    assert Image.open(folder.picture).size == (128, 128)
    assert folder.half_way.is_file()
    assert len(list(folder.cache.rglob("latents/**/*.safetensors"))) == NUM_PICTURES + NUM_KNOWN
    again = subprocess.run([*HYIMG, "demo", folder.directory], capture_output=True, text=True)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.long
def test_the_demo_has_taught_what_was_measured(demo):
    """Half of the pictures that were measured, with the same seeds, less a margin for what other machines round."""
    folder, _ = demo
    measured = json.loads((WEIGHTS / PROOF).read_text())
    proof = prove(folder.directory, SilentReporter(), num_seeds=50)
    trigger, known = proof["trigger"], proof["without_trigger"]
    for name in ("shape", "shape_and_colors", "position"):
        assert trigger["lora"][name] >= measured["trigger"]["lora"][name] - 0.15
    assert trigger["base"]["shape"] <= 0.1
    assert trigger["comfy_lora"] == trigger["lora"]
    assert known["lora"]["shape_and_colors"] >= known["base"]["shape_and_colors"] - 0.15
    assert proof["multiplier_0_equals_base"] is True
    assert proof["validation_loss"]["last"] < proof["validation_loss"]["first"]


def test_an_installation_without_the_model_is_told_and_an_earlier_demo_stays(tmp_path, hyimg, monkeypatch):
    monkeypatch.setattr(concept, "WEIGHTS", tmp_path / "nowhere")
    folder = DemoFolder(tmp_path / "demo")
    folder.directory.mkdir()
    folder.marker.write_text("an earlier one")
    code, _, err = hyimg("demo", folder.directory, "--overwrite")
    assert code == 2
    assert "this installation of hyimg has no micro model" in err
    assert folder.marker.read_text() == "an earlier one"


def test_a_folder_with_other_things_is_left_alone(tmp_path, hyimg):
    (tmp_path / "letter.txt").write_text("mine")
    code, _, err = hyimg("demo", tmp_path, "--overwrite")
    assert code == 2
    assert "is not empty and no earlier demo" in err
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("4", "4")])
def test_every_command_of_the_demo_computes_in_one_thread_unless_told_otherwise(
    tmp_path, hyimg, monkeypatch, given, expected
):
    threads = []

    def run(command, *, environment):
        threads.append(environment["OMP_NUM_THREADS"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("hyimg.stages.demo.run_command", run)
    for slow in ("copy_micro_model", "_write_dataset"):
        monkeypatch.setattr(f"hyimg.stages.demo.{slow}", lambda folder, **_: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    code, _, err = hyimg("demo", tmp_path / "demo")
    assert code == 0
    assert threads == [expected] * len(COMMANDS)
    assert ("OMP_NUM_THREADS=1" in err) is (given is None)


@pytest.mark.long
def test_a_model_of_the_true_depth_trains_and_renders(tmp_path, hyimg, cached_dataset):
    assert hyimg("make-tiny-model", tmp_path / "full", "--depth", "full")[0] == 0
    dit = tmp_path / "full" / "hunyuanimage2.1.safetensors"
    arguments = ["train", "--dit", dit, "--dataset_config", cached_dataset, "--output_dir", tmp_path / "run"]
    code, _, err = hyimg(*arguments, "--max_train_steps", "3", "--gradient_checkpointing")
    assert code == 0, err
    assert "320 of 320 modules" in err
    encoders = ["--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
    render = [
        "--prompt",
        "a cat",
        "--image_size",
        "512",
        "768",
        "--infer_steps",
        "2",
        "--save_path",
        tmp_path / "a.png",
    ]
    lora = ["--lora_weight", tmp_path / "run" / "lora.safetensors"]
    code, _, err = hyimg("infer", "--dit", dit, *encoders, *render, *lora)
    assert code == 0, err
    assert Image.open(tmp_path / "a.png").size == (768, 512)
