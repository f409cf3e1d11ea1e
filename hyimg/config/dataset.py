"""The dataset file and the caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import option


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Dataset and caches."""

    dataset_config: Path | None = option(None, is_input=True, help="the dataset file, TOML or JSON")
    cache_dir: Path | None = option(
        None, help="where the caches live (not given: `hyimg-cache` beside the dataset file)"
    )
    on_bad_image: str = option(
        "error",
        choices=("error", "skip"),
        help="an image that cannot be read: stop, or leave it out and say so",
    )
    caption_variants: int = option(
        8,
        minimum=1,
        help="cached variants of a caption that has randomness (shuffle, wildcards, tag dropout)",
    )
    caption_transform: tuple[str, ...] = option(
        (),
        help="a plugin's functions that captions pass through, in this order, before their variants are drawn",
    )
    caption_transform_args: tuple[str, ...] = option(
        (), help='their arguments: `"name=value"`; each goes to the functions that take it'
    )


@dataclass(frozen=True, kw_only=True)
class NamedDataset(DatasetOptions):
    """Dataset and caches."""

    dataset_config: Path | None = option(None, argument=True, help="the dataset file, TOML or JSON")


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Report."""

    dry_run: bool = option(
        False, help="print the report of `hyimg dataset` for these options, and do nothing else"
    )


@dataclass(frozen=True, kw_only=True)
class ReportOutput:
    """Output."""

    json: bool = option(False, help="print JSON")
    contact_sheet: Path | None = option(
        None, help="PNG file to write: every bucket with a few of its images as they are cropped"
    )


@dataclass(frozen=True, kw_only=True)
class ReportModels:
    """Model files (none is needed; named, the report is about the caches that these make)."""

    vae: Path | None = option(None, pipeline_part="vae", help="the VAE, a file or a folder")
    text_encoder: Path | None = option(
        None, pipeline_part="text_encoder", help="Qwen2.5-VL, a file or a folder (with `--byt5`)"
    )
    byt5: Path | None = option(
        None, pipeline_part="text_encoder_2", help="byT5 glyph encoder (with `--text_encoder`)"
    )
    fp8_vl: bool = option(False, help="the text cache is one that was made with `--fp8_vl`")
    tokenizer: Path | None = option(
        None,
        pipeline_part="tokenizer",
        aliases=("tokenizer_cache_dir",),
        help="folder with the Qwen tokenizer's files, or a `qwen.tiktoken` file, to count the captions' tokens "
        "(not given: as for cache-text, but nothing is downloaded)",
    )


@dataclass(frozen=True, kw_only=True)
class ReportTraining:
    """What else will be asked."""

    train_batch_size: int | None = option(
        None, minimum=1, help="batch size where the dataset file does not give one (not given: 1)"
    )
    gradient_accumulation_steps: int = option(1, minimum=1, help="batches to a step")
    validation_split: float | None = option(
        None,
        minimum=0,
        maximum=0.9,
        help="share of each subset's images that is held back, where the dataset file does not say it",
    )
    validation_seed: int | None = option(None, minimum=0, help="which images these are (not given: 0)")
    sample_prompts: Path | None = option(
        None, help="prompt file (txt, toml or json) whose prompts cache-text caches too"
    )


@dataclass(frozen=True, kw_only=True)
class LatentCaching:
    """Latent cache."""

    vae_batch_size: int = option(1, minimum=1, help="images of one bucket that are encoded together")


@dataclass(frozen=True, kw_only=True)
class TextCaching:
    """Text cache."""

    sample_prompts: Path | None = option(
        None,
        is_input=True,
        help="prompt file (txt, toml or json) whose prompts are cached too, so that rendering needs no encoder",
    )


@dataclass(frozen=True, kw_only=True)
class CacheUpkeep:
    """Upkeep of the cache."""

    verify: bool = option(
        False,
        help="read every entry that the dataset refers to again and compare its checksum; what is damaged "
        "is named and made again",
    )
    prune: bool = option(
        False,
        help="afterwards remove this model's entries that the dataset does not refer to, and say what it frees",
    )
    keep_for: tuple[Path, ...] = option(
        (), help="with `--prune`: further dataset files that use this cache, whose entries stay too"
    )


@dataclass(frozen=True, kw_only=True)
class CachesInTraining:
    """Filling the caches first."""

    cache_latents: bool = option(
        False, help="run cache-latents first (the cache is content-addressed and kept)"
    )
    cache_latents_to_disk: bool = option(False, help="the same as `--cache_latents`")
    cache_text_encoder_outputs: bool = option(False, help="run cache-text first (the cache is kept)")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="the same as `--cache_text_encoder_outputs`"
    )
    skip_cache_check: bool = option(
        False,
        help="take every entry to be there without a look; one that is not is an error at the step that needs it",
    )
    latent_sampling: str = option(
        "sample", choices=("sample", "mean"), help="a fresh posterior sample at each step, or the mean"
    )
    max_data_loader_n_workers: int = option(0, minimum=0, help="processes that read the caches ahead")
    persistent_data_loader_workers: bool = option(False, help="keep those processes between epochs")
