"""`hyimg demo`, as a user runs it, and a dry run at the true depth. Minutes long."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from hyimg.stages.demo import COMMANDS, PHOTOGRAPHS

HYIMG = [sys.executable, "-m", "hyimg"]


@pytest.mark.long
def test_the_demo_ends_in_pictures_and_a_lora(tmp_path):
    pytest.importorskip("skimage")
    folder = tmp_path / "a folder with blanks"
    done = subprocess.run([*HYIMG, "demo", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"$ hyimg {command.split()[0]} " in done.stderr
    sheet = Image.open(folder / "sample" / "sheet.png")
    assert sheet.width > 3 * 256
    assert Image.open(folder / "render" / "astronaut.png").size == (256, 256)
    assert (folder / "run" / "demo.safetensors").is_file()
    assert (folder / "demo-comfy.safetensors").is_file()
    assert len(list((folder / "hyimg-cache" / "latents").rglob("*.safetensors"))) == len(PHOTOGRAPHS)
    again = subprocess.run([*HYIMG, "demo", folder], capture_output=True, text=True)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_a_folder_with_other_things_is_left_alone(tmp_path, hyimg):
    pytest.importorskip("skimage")
    (tmp_path / "letter.txt").write_text("mine")
    code, _, err = hyimg("demo", tmp_path, "--overwrite")
    assert code == 2
    assert "is not empty and no earlier demo" in err
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


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
