"""The small commands, from convert-comfy to demo, and what all commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import option


@dataclass(frozen=True, kw_only=True)
class Common:
    """General."""

    plugin: tuple[str, ...] = option((), help="plugin to load: a `.py` file or a module's name")
    config: Path | None = option(
        None,
        aliases=("config_file",),
        help="TOML file with options, underscores in their names; flags win over it",
    )


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Conversion."""

    source: Path | None = option(None, is_input=True, argument=True, help="LoRA file to read")
    destination: Path | None = option(None, argument=True, help="file to write")
    to: str | None = option(
        None, choices=("comfy", "kohya", "diffusers", "peft"), help="format to write (not given: comfy)"
    )
    reverse: bool = option(False, help="the same as `--to kohya`")
    max_rank: int | None = option(
        None,
        minimum=1,
        help="give no module a larger rank than this: the closest LoRA of it is made, and the error told; also of "
        "a LoHa or LoKr, where the format cannot hold it",
    )
    allow_partial: bool = option(
        False, help="leave out what stands on no module that a LoRA of this model can, and name it"
    )
    overwrite: bool = option(False, help="replace the destination")


@dataclass(frozen=True, kw_only=True)
class Merging:
    """Merging."""

    loras: tuple[Path, ...] = option((), is_input=True, argument=True, help="LoRA files, in any formats")
    weights: tuple[float, ...] = option((), help="a weight each, or one for all (not given: 1)")
    output: Path | None = option(None, aliases=("o",), help="file to write")
    to: str = option("kohya", choices=("comfy", "kohya", "diffusers", "peft"), help="format to write")
    max_rank: int | None = option(
        None,
        minimum=1,
        help="give no module a larger rank than this: the closest LoRA of it is made, and the error told (not "
        "given: ranks add up, and nothing is lost)",
    )
    allow_partial: bool = option(
        False, help="leave out what stands on no module that a LoRA of this model can, and name it"
    )
    overwrite: bool = option(False, help="replace the output")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What to list."""

    arch: str | None = option(
        None,
        choices=("2.1", "2.1-distilled", "tiny", "full"),
        help="known architecture, in place of a checkpoint",
    )
    pattern: str | None = option(None, help="list only the modules that this regular expression matches")
    tree: bool = option(False, help="blocks that are alike once, with their number")
    names: str | None = option(
        None,
        choices=("kohya", "comfy", "diffusers", "peft"),
        help="the names that LoRA files of a tool have (not given: the model's own); patterns match the model's own "
        "and kohya's whatever is shown",
    )
    json: bool = option(False, help="print JSON")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Options of train that the totals depend on."""

    optimizer_type: str = option("AdamW", help="optimiser whose memory is told")
    save_precision: str = option(
        "bf16",
        choices=("float", "fp16", "bf16"),
        synonyms={"fp32": "float"},
        help="type of the weights in the file whose size is told",
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to check."""

    lora: Path | None = option(None, is_input=True, argument=True, help="LoRA file to check")
    fp8: bool = option(
        False,
        help="also how much of the LoRA would survive being merged into an fp8 model: needs `--dit`, whose "
        "weights are read one at a time",
    )
    device: str | None = option(
        None, help="where `--fp8` computes: cuda, cuda:N or cpu (not given: the best one there is)"
    )
    json: bool = option(False, help="print JSON")


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Tiny model."""

    directory: Path | None = option(None, argument=True, help="folder to write")
    depth: str = option("tiny", choices=("tiny", "full"), help="2+4 blocks, or the true 20+40")
    seed: int = option(0, minimum=0, help="seed of the weights")
    overwrite: bool = option(False, help="replace files that are there")


@dataclass(frozen=True, kw_only=True)
class Download:
    """Download."""

    directory: Path | None = option(None, argument=True, help="folder to write")
    variant: str = option(
        "bf16",
        choices=("bf16", "fp8", "distilled"),
        help="the DiT: in bf16, in scaled fp8, or the distilled one of 8 steps",
    )
    revision: tuple[str, ...] = option(
        (), help="branch, tag or commit: `NAME` for every repository, `REPOSITORY=NAME` for one"
    )
    token: str | None = option(
        None,
        aliases=("huggingface_token",),
        help="access token of the hub (not given: `HF_TOKEN`, or that of `hf auth login`)",
    )
    overwrite: bool = option(False, help="replace files of other content that are there")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Demo."""

    directory: Path | None = option(None, argument=True, help="folder to work in")
    overwrite: bool = option(False, help="start afresh where the folder holds an earlier demo")


@dataclass(frozen=True, kw_only=True)
class PluginList:
    """Output."""

    json: bool = option(False, help="print JSON")
