"""Every command of hyimg: listed in the help, in docs/commands.md and for plugins without importing what it runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from hyimg.config.option import Option


class Command(NamedTuple):
    """What `hyimg --help` says of a command, and what it runs.

    `target` is the place, "module:function", of a function that takes the command's config and a Reporter; `config`
    that of the config's class.
    """

    panel: str
    help: str
    target: str
    config: str


_STAGES, _TOOLS = "Stages", "Tools"

COMMAND_TABLE: Mapping[str, Command] = {
    "dataset": Command(
        _STAGES,
        "Report on a dataset: images, buckets, caches, cost and captions, before any model is loaded.",
        "hyimg.stages.dataset:dataset",
        "hyimg.config.commands:DatasetConfig",
    ),
    "cache-latents": Command(
        _STAGES,
        "Encode the dataset's images with the VAE and store the latents on disk.",
        "hyimg.pipeline:cache_latents",
        "hyimg.config.commands:CacheLatentsConfig",
    ),
    "cache-text": Command(
        _STAGES,
        "Encode the dataset's captions with Qwen2.5-VL and byT5 and store the results on disk.",
        "hyimg.pipeline:cache_text",
        "hyimg.config.commands:CacheTextConfig",
    ),
    "train": Command(
        _STAGES,
        "Train a LoRA on the cached dataset.",
        "hyimg.pipeline:train",
        "hyimg.config.commands:TrainConfig",
    ),
    "sample": Command(
        _STAGES,
        "Render a prompt file with one or more LoRA files, and make a contact sheet of the results.",
        "hyimg.stages.sample:sample",
        "hyimg.config.commands:SampleConfig",
    ),
    "infer": Command(
        _STAGES,
        "Render images from prompts, with or without LoRA files.",
        "hyimg.stages.infer:infer",
        "hyimg.config.commands:InferConfig",
    ),
    "convert-comfy": Command(
        _STAGES,
        "Convert a LoRA file to ComfyUI's names, or between any two supported formats.",
        "hyimg.stages.convert_comfy:convert_comfy",
        "hyimg.config.tools:ConvertComfyConfig",
    ),
    "merge": Command(
        _STAGES,
        "Merge LoRA files into one, each with its own weight; exact unless a rank is given.",
        "hyimg.stages.merge:merge",
        "hyimg.config.tools:MergeConfig",
    ),
    "inspect-modules": Command(
        _STAGES,
        "List the modules that a LoRA can train and a pattern can match, with each one's rank and learning rate.",
        "hyimg.stages.inspect_modules:inspect_modules",
        "hyimg.config.commands:InspectModulesConfig",
    ),
    "check": Command(
        _STAGES,
        "Check a LoRA file: which programs can load it, what they ignore, ranks, norms, and damage.",
        "hyimg.stages.check:check",
        "hyimg.config.tools:CheckConfig",
    ),
    "download-models": Command(
        _TOOLS,
        "Download the model files from the Hugging Face hub; an interrupted download resumes.",
        "hyimg.stages.download_models:download_models",
        "hyimg.config.tools:DownloadModelsConfig",
    ),
    "make-tiny-model": Command(
        _TOOLS,
        "Write a complete tiny model with random weights, to try out your commands.",
        "hyimg.stages.make_tiny_model:make_tiny_model",
        "hyimg.config.tools:MakeTinyModelConfig",
    ),
    "demo": Command(
        _TOOLS,
        "Teach a new shape to the micro model that comes with hyimg; prints each command it runs.",
        "hyimg.stages.demo:demo",
        "hyimg.config.tools:DemoConfig",
    ),
    "plugins": Command(
        _TOOLS,
        "List the loaded plugins: where each comes from, its hooks, and the names it provides.",
        "hyimg.stages.plugins:plugins",
        "hyimg.config.tools:PluginsConfig",
    ),
}


def config_of(command: str) -> type:
    """The config class of a command; imports only the module that holds it."""
    module, _, name = COMMAND_TABLE[command].config.partition(":")
    return cast(type, getattr(importlib.import_module(module), name))


def options_of_all_commands() -> Iterator[Option]:
    """Every option of every command; imports all groups of options, of which a command needs few."""
    from hyimg.config.option import all_options

    return (opt for command in COMMAND_TABLE for opt in all_options(config_of(command)))
