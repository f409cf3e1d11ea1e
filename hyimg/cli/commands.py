"""What each command runs. The docstrings are the commands' help; heavy modules are imported inside."""

from __future__ import annotations

import typer

from hyimg.config.commands import (
    CacheLatentsConfig,
    CacheTextConfig,
    CheckConfig,
    ConvertComfyConfig,
    DatasetConfig,
    DemoConfig,
    DownloadModelsConfig,
    InferConfig,
    InspectModulesConfig,
    MakeTinyModelConfig,
    MergeConfig,
    PluginsConfig,
    SampleConfig,
    TrainConfig,
)
from hyimg.report import Reporter


def dataset(config: DatasetConfig, report: Reporter) -> None:
    """Report on a dataset: images, buckets, caches, cost and captions, before any model is loaded."""
    from hyimg.stages.dataset import dataset

    dataset(config, report)


def cache_latents(config: CacheLatentsConfig, report: Reporter) -> None:
    """Encode the dataset's images with the VAE, and keep the latents on disk."""
    from hyimg.pipeline import cache_latents

    cache_latents(config, report)


def cache_text(config: CacheTextConfig, report: Reporter) -> None:
    """Encode the dataset's captions with Qwen2.5-VL and byT5, and keep the results on disk."""
    from hyimg.pipeline import cache_text

    cache_text(config, report)


def train(config: TrainConfig, report: Reporter) -> None:
    """Train a LoRA on the cached dataset."""
    from hyimg.pipeline import train

    train(config, report)


def sample(config: SampleConfig, report: Reporter) -> None:
    """Render a prompt file with one or more LoRA files, and make a contact sheet of the results."""
    from hyimg.stages.sample import sample

    sample(config, report)


def infer(config: InferConfig, report: Reporter) -> None:
    """Render images from prompts, with or without LoRA files."""
    from hyimg.stages.infer import infer

    infer(config, report)


def convert_comfy(config: ConvertComfyConfig, report: Reporter) -> None:
    """Convert a LoRA file to ComfyUI's names, or from any tool's form to any other's."""
    from hyimg.stages.convert_comfy import convert_comfy

    convert_comfy(config, report)


def merge(config: MergeConfig, report: Reporter) -> None:
    """Merge LoRA files into one, each with a weight: nothing is lost, unless a rank is given."""
    from hyimg.stages.merge import merge

    merge(config, report)


def inspect_modules(config: InspectModulesConfig, report: Reporter) -> None:
    """List the modules that a LoRA can train and a pattern can name, with the rank and rate that each gets."""
    from hyimg.stages.inspect_modules import inspect_modules

    inspect_modules(config, report)


def check(config: CheckConfig, report: Reporter) -> None:
    """Look into a LoRA file: which programs load it and what they drop, ranks, norms, what is broken."""
    from hyimg.stages.check import check

    check(config, report)


def download_models(config: DownloadModelsConfig, report: Reporter) -> None:
    """Fetch the model's files from the Hugging Face hub; what was interrupted goes on where it stopped."""
    from hyimg.stages.download_models import download_models

    download_models(config, report)


def make_tiny_model(config: MakeTinyModelConfig, report: Reporter) -> None:
    """Write a complete tiny model with random weights, for dry runs of your own commands."""
    from hyimg.stages.make_tiny_model import make_tiny_model

    make_tiny_model(config, report)


def demo(config: DemoConfig, report: Reporter) -> None:
    """Teach a micro model that comes with hyimg a new shape, with the real commands, each printed."""
    from hyimg.stages.demo import demo

    demo(config, report)


def list_plugins(config: PluginsConfig, report: Reporter) -> None:
    """List the plugins that are loaded, from where, their hooks, and the names that they provide."""
    import json
    from dataclasses import asdict

    from hyimg.plugins import load_plugins

    rows = load_plugins(config.common.plugin).listing()
    if config.listing.json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        typer.echo(f"{row.name} ({row.origin})")
        typer.echo(f"  hooks: {', '.join(row.hooks) or 'none'}")
        for kind, names in row.provides.items():
            typer.echo(f"  {kind.replace('_', ' ')}: {', '.join(names)}")
