"""Two tiny models, a dataset of four images with caches of random numbers, and the train stage as a function."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from hyimg.cache.hashing import file_identity
from hyimg.cache.latents import LatentEntry, LatentStore
from hyimg.cache.prompt_embeddings import PromptEmbedding, TextStore
from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.config.commands import TrainConfig
from hyimg.config.dataset_options import DatasetOptions
from hyimg.config.load import make
from hyimg.config.tools import MakeTinyModelConfig
from hyimg.data.caching import prompts_of
from hyimg.data.workspace import open_workspace
from hyimg.encoders.text import TextEncoders
from hyimg.hookspecs import hookimpl
from hyimg.randomness import keyed_generator
from hyimg.report import SilentReporter
from hyimg.stages.make_tiny_model import ModelFolder, make_tiny_model
from hyimg.stages.train import train as train_stage
from hyimg.training.run import Run

NUM_IMAGES = 4


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelFolder]:
    """Two of everything, so that a cache can be of one and not of the other."""
    folders = [tmp_path_factory.mktemp(f"model{seed}") for seed in range(2)]
    return [
        make_tiny_model(make(MakeTinyModelConfig, {"directory": folder, "seed": seed}), SilentReporter())
        for seed, folder in enumerate(folders)
    ]


def _random(shape: tuple[int, ...], *key: object) -> torch.Tensor:
    return torch.randn(shape, generator=keyed_generator(*key))


def fill_caches(dataset_config: Path, vae: ModelFolder, encoders: ModelFolder) -> None:
    """Entries of random numbers, other ones for each model."""
    space = open_workspace(DatasetOptions(dataset_config=dataset_config), SilentReporter())
    latents = LatentStore(space.latents_dir, file_identity(vae.vae), index=space.index)
    identity = TextEncoders.open(encoders.text_encoder, encoders.byt5).identity
    texts = TextStore(space.text_dir, identity, index=space.index)
    for sample in space.all_samples:
        mean_CHW = _random((DIT_TINY.latent_channels, 2, 2), "mean", latents.model_identity, sample.key)
        latents.write(sample.recipe(), LatentEntry(mean_CHW, torch.full_like(mean_CHW, 0.5)))
    for prompt in prompts_of(space.all_samples):
        text_TD = _random((3 + len(prompt), DIT_TINY.text_dim), "text", identity, prompt)
        texts.write(prompt, PromptEmbedding(text_TD))


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory, models: list[ModelFolder]) -> Callable[..., Path]:
    """Writes a dataset of four images of one bucket and caches by the first model; gives the dataset file."""

    def write(dataset_lines: str = "", caches: tuple[tuple[int, int], ...] = ((0, 0),)) -> Path:
        """`caches` holds (number of the VAE's model, number of the encoders' model)."""
        folder = tmp_path_factory.mktemp("dataset")
        (folder / "images").mkdir()
        for number in range(NUM_IMAGES):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            (folder / "images" / f"{number}.txt").write_text("cat" * (number + 1), encoding="utf-8")
        path = folder / "data.toml"
        path.write_text(
            f"[[datasets]]\nresolution = 64\n{dataset_lines}\n[[datasets.subsets]]\nimage_dir = 'images'\n",
            encoding="utf-8",
        )
        for vae, encoders in caches:
            fill_caches(path, models[vae], models[encoders])
        return path

    return write


@pytest.fixture(scope="session")
def dataset(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A plugin: keeps the runs that start, calls `on_start` with each, and provides `losses`."""
    module = ModuleType("spy")

    @hookimpl
    def hyimg_run_start(run: Run) -> None:
        module.runs.append(run)
        module.on_start(run)

    @hookimpl
    def hyimg_losses() -> dict[str, Callable[..., torch.Tensor]]:
        return module.losses

    module.runs, module.losses, module.on_start = [], {}, lambda run: None
    module.hyimg_run_start, module.hyimg_losses = hyimg_run_start, hyimg_losses
    monkeypatch.setitem(sys.modules, "spy", module)
    return module


@pytest.fixture
def report() -> SilentReporter:
    """Where `train` reports: `report.warnings`."""
    return SilentReporter()


@pytest.fixture
def train(
    models: list[ModelFolder], dataset: Path, spy: ModuleType, tmp_path: Path, report: SilentReporter
) -> Callable[..., Run]:
    """Runs the stage for one step of one image, or as the options say; gives the run, over by then.

    Folders are fresh: `run0`, `run1` and so on under `tmp_path`.
    """
    numbers = itertools.count()

    def call(**options: object) -> Run:
        own = {
            "dit": models[0].dit,
            "dataset_config": dataset,
            "output_dir": tmp_path / f"run{next(numbers)}",
        }
        own |= {"max_train_steps": 1, "seed": 1, "mixed_precision": "no", "save_precision": "float"}
        own |= {"device": "cpu", "plugin": ("spy",)}
        train_stage(make(TrainConfig, own | options), report)
        return spy.runs[-1]

    return call
