"""The options and configs of the small commands, and the options that all commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.models import DiTFile
from hyimg.config.option import REQUIRED, CommandOptions, Given, option


@dataclass(frozen=True, kw_only=True)
class Common:
    """General."""

    plugin: tuple[str, ...] = option(
        (), text="path", imports="any", help="plugin to load: a `.py` file or a module's name"
    )
    config: Path | None = option(
        None,
        aliases=("config_file",),
        help="TOML file with options (names with underscores); flags win over it",
    )


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Conversion."""

    source: Path = option(REQUIRED, is_input=True, argument=True, help="LoRA file or PEFT folder to read")
    destination: Path = option(REQUIRED, argument=True, help="file to write")
    to: str | None = option(
        None, choices=("comfy", "kohya", "diffusers", "peft"), help="format to write (not given: comfy)"
    )
    reverse: bool = option(False, help="the same as `--to kohya`")
    max_rank: int | None = option(
        None,
        minimum=1,
        help="largest rank of a module: higher ones, and LoHa or LoKr where the format cannot hold them, are "
        "approximated as closely as possible, and the error is reported",
    )
    allow_partial: bool = option(
        False, help="skip what belongs to no module that a LoRA of this model can train, with a warning"
    )
    overwrite: bool = option(False, help="replace the destination")


@dataclass(frozen=True, kw_only=True)
class Merging:
    """Merging."""

    loras: tuple[Path, ...] = option(
        REQUIRED, is_input=True, argument=True, help="LoRA files or PEFT folders, in any format"
    )
    weights: tuple[float, ...] = option((), help="a weight for each file (not given: 1)")
    output: Path = option(REQUIRED, aliases=("o",), help="file to write")
    to: str = option("kohya", choices=("comfy", "kohya", "diffusers", "peft"), help="format to write")
    max_rank: int | None = option(
        None,
        minimum=1,
        help="largest rank of a module: higher ones are approximated as closely as possible, and the error is reported "
        "(not given: ranks add up, and the merge is exact)",
    )
    allow_partial: bool = option(
        False, help="skip what belongs to no module that a LoRA of this model can train, with a warning"
    )
    overwrite: bool = option(False, help="replace the output")


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """What to list."""

    arch: str | None = option(
        None,
        choices=("2.1", "2.1-distilled", "tiny", "full"),
        help="known architecture, instead of a checkpoint",
    )
    pattern: str | None = option(None, help="list only modules that match this regular expression")
    tree: bool = option(False, help="collapse identical blocks, with their number")
    names: str | None = option(
        None,
        choices=("kohya", "comfy", "diffusers", "peft"),
        help="show the names used in the LoRA files of a tool (not given: the model's own); patterns match the model's "
        "names and kohya's in any case",
    )
    json: bool = option(False, help="print JSON")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Training options that affect the totals."""

    optimizer_type: str = option("AdamW", help="optimiser whose memory is estimated")
    save_precision: str = option(
        "bf16",
        choices=("float", "fp16", "bf16"),
        synonyms={"fp32": "float"},
        help="type of the weights for the reported file size",
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to check."""

    lora: Path = option(REQUIRED, is_input=True, argument=True, help="LoRA file or PEFT folder to check")
    fp8: bool = option(
        False,
        help="also report how much of the LoRA would survive a merge into an fp8 model: needs `--dit`, whose "
        "weights are read one at a time",
    )
    device: str | None = option(
        None,
        help="device for `--fp8`: cuda, cuda:N, xpu, mps or cpu (not given: the best available)",
        needs=(Given("fp8"),),
    )
    json: bool = option(False, help="print JSON")


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Tiny model."""

    directory: Path = option(REQUIRED, argument=True, help="folder to write")
    depth: str = option("tiny", choices=("tiny", "full"), help="2+4 blocks, or the real 20+40")
    seed: int = option(0, minimum=0, help="seed of the weights")
    overwrite: bool = option(False, help="replace existing files")


@dataclass(frozen=True, kw_only=True)
class Download:
    """Download."""

    directory: Path = option(REQUIRED, argument=True, help="folder to write")
    variant: str = option(
        "bf16",
        choices=("bf16", "fp8", "distilled"),
        help="the DiT: bf16, scaled fp8, or the distilled 8-step model",
    )
    revision: tuple[str, ...] = option(
        (), help="branch, tag or commit: `NAME` for every repository, `REPOSITORY=NAME` for one"
    )
    token: str | None = option(
        None,
        aliases=("huggingface_token",),
        help="access token for the hub (not given: `HF_TOKEN`, or that of `hf auth login`)",
    )
    overwrite: bool = option(False, help="replace existing files with other content")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Demo."""

    directory: Path = option(REQUIRED, argument=True, help="folder to work in")
    overwrite: bool = option(False, help="start over where the folder holds an earlier demo")


@dataclass(frozen=True, kw_only=True)
class PluginList:
    """Output."""

    json: bool = option(False, help="print JSON")


@dataclass(frozen=True, kw_only=True)
class ConvertComfyConfig(CommandOptions):
    conversion: ConversionOptions


@dataclass(frozen=True, kw_only=True)
class MergeConfig(CommandOptions):
    merging: Merging


@dataclass(frozen=True, kw_only=True)
class CheckConfig(CommandOptions):
    check: Check
    dit: DiTFile


@dataclass(frozen=True, kw_only=True)
class DownloadModelsConfig(CommandOptions):
    download: Download


@dataclass(frozen=True, kw_only=True)
class MakeTinyModelConfig(CommandOptions):
    tiny: TinyModel


@dataclass(frozen=True, kw_only=True)
class DemoConfig(CommandOptions):
    demo: Demo


@dataclass(frozen=True, kw_only=True)
class PluginsConfig(CommandOptions):
    listing: PluginList
    common: Common
