"""A tiny model, a small dataset and filled caches, made once; and the command line as a function."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyimg.cli.app import run
from hyimg.config.load import make
from hyimg.config.tools import MakeTinyModelConfig
from hyimg.report import SilentReporter
from hyimg.stages.make_tiny_model import ModelFolder, make_tiny_model

DATASET = """
[general]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 192
bucket_reso_steps = 32

[[datasets]]
resolution = 128
batch_size = 2

  [[datasets.subsets]]
  image_dir = "images"
  num_repeats = 1
"""
CAPTIONS = [
    "a red square",
    'a sign with the word "GO"',
    "a green field under a sky",
    "a dark road at night",
    "a cat",
]
SIZES = [(160, 120), (128, 128), (120, 170), (200, 200), (300, 90)]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_model(make(MakeTinyModelConfig, {"directory": folder}), SilentReporter())


def write_dataset(folder: Path) -> Path:
    """Five small pictures in four buckets with captions, and the dataset file's path."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, (caption, (width, height)) in enumerate(zip(CAPTIONS, SIZES, strict=True)):
        noise = np.random.default_rng(number).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(caption, encoding="utf-8")
    (folder / "data.toml").write_text(DATASET, encoding="utf-8")
    return folder / "data.toml"


@pytest.fixture(scope="session")
def cached_dataset(tmp_path_factory, model) -> Path:
    """A dataset file whose caches are full. Read only: tests that change files take `own_dataset`."""
    path = write_dataset(tmp_path_factory.mktemp("cached"))
    assert run(["cache-latents", "--dataset_config", str(path), "--vae", str(model.vae)]) == 0
    assert run(["cache-text", "--dataset_config", str(path), *encoders(model)]) == 0
    return path


@pytest.fixture
def own_dataset(tmp_path, cached_dataset) -> Path:
    """A copy of the cached dataset that a test may change."""
    folder = tmp_path / "own"
    shutil.copytree(cached_dataset.parent, folder)
    return folder / "data.toml"


def encoders(model: ModelFolder) -> list[str]:
    """The text encoders, one prompt at a time: kernels round by a batch's shape, and tests compare bytes."""
    files = ["--text_encoder", str(model.text_encoder), "--byt5", str(model.byt5)]
    return [*files, "--text_encoder_batch_size", "1"]


@pytest.fixture
def fill(model):
    """The command line that fills the cache of a stage ("latents" or "text") for a dataset file."""

    def command(stage: str, dataset, *extra) -> list[str]:
        files = ["--vae", str(model.vae)] if stage == "latents" else encoders(model)
        return [f"cache-{stage}", "--dataset_config", str(dataset), *files, *map(str, extra)]

    return command


@pytest.fixture
def entries():
    """The entries of a stage's cache beside a dataset file, sorted."""

    def listed(dataset: Path, stage: str) -> list[Path]:
        return sorted((dataset.parent / "hyimg-cache" / stage).glob("*/*/*.safetensors"))

    return listed


@pytest.fixture
def hyimg(capsys, model):
    """Runs a command line; gives (exit code, stdout, stderr). `{dit}` and the like stand for model files."""

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        names = {option: str(path) for option, path in model.files().items()}
        code = run([names.get(str(a)[1:-1], str(a)) if str(a).startswith("{") else str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory, model, cached_dataset) -> Path:
    """The run folder of a short training named `lora`: 2 epochs of 4 batches."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["train", "--dit", model.dit, "--dataset_config", cached_dataset, "--output_dir", folder]
    arguments += (
        "--max_train_epochs 2 --seed 7 --network_dim 4 --network_alpha 4 --learning_rate 1e-2".split()
    )
    arguments += (
        "--save_every_n_epochs 1 --save_every_n_steps 3 --mixed_precision no --save_precision float".split()
    )
    arguments += ["--log_with", "tensorboard"]
    assert run([str(a) for a in arguments]) == 0
    return folder
