"""Rendering: infer and sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import MAX_SEED, option


@dataclass(frozen=True, kw_only=True)
class LoRAFiles:
    """LoRA."""

    lora_weight: tuple[Path, ...] = option(
        (), is_input=True, help="LoRA files, in any format that hyimg reads"
    )
    lora_multiplier: tuple[float, ...] = option((), help="a multiplier each (not given: 1)")
    include_patterns: tuple[str, ...] = option(
        (), help='a regular expression each: only modules that match are applied (`""`: all)'
    )
    exclude_patterns: tuple[str, ...] = option(
        (), help='a regular expression each: modules that match are left out (`""`: none)'
    )
    lora_mode: str = option(
        "live",
        choices=("live", "merge"),
        help="live: beside the weights, at full precision; merge: added to the weights while they load, and rounded "
        "with them, so that a step computes nothing more",
    )
    save_merged_model: Path | None = option(
        None,
        help="save the DiT with the LoRAs merged, in the names and types of its file; without a prompt nothing is "
        "rendered",
    )
    lycoris: bool = option(
        False,
        help="changes nothing: LoHa and LoKr files are recognised by themselves",
        note="LoHa and LoKr files are recognised by themselves",
    )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt."""

    prompt: str | None = option(None, help="what to render; text in double quotes is drawn as letters")
    negative_prompt: str | None = option(None, help="what to keep away from (not given: the empty prompt)")
    from_file: Path | None = option(
        None,
        is_input=True,
        help="prompt file: text lines with --w --h --d --s --l --g --n --fs, TOML or JSON",
    )
    interactive: bool = option(
        False, help="ask for prompt lines one after another, the DiT and the VAE staying loaded"
    )
    from_image: Path | None = option(
        None,
        is_input=True,
        help="picture of `infer` or `sample` whose settings are taken; flags that are given win",
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling."""

    image_size: tuple[int, ...] = option(
        (2048, 2048), count=2, minimum=32, multiple_of=32, help="height and width in pixels, multiples of 32"
    )
    infer_steps: int | None = option(None, minimum=1, help="steps (not given: 50, distilled 8)")
    guidance_scale: float | None = option(None, minimum=0, help="guidance (not given: 3.5, distilled 3.25)")
    flow_shift: float | None = option(
        None, minimum=0, exclusive_minimum=True, help="shift of the schedule (not given: 5, distilled 4)"
    )
    seed: int | None = option(
        None, minimum=0, maximum=MAX_SEED, help="seed of the noise (not given: drawn, and recorded)"
    )
    sampler: str = option("euler", help="sampler: euler, heun, dpm++2m, or a plugin's name")
    sampler_args: tuple[str, ...] = option((), help='arguments of a plugin\'s sampler: `"name=value"`')
    apg_start_step_general: int = option(5, minimum=0, help="step after which APG takes over from CFG")
    apg_start_step_ocr: int = option(38, minimum=0, help="the same for prompts with quoted text")
    guidance_rescale: float = option(
        0.0, minimum=0, maximum=1, help="rescale of the guidance before APG starts"
    )
    guidance_rescale_apg: float = option(0.0, minimum=0, maximum=1, help="rescale of the guidance under APG")
    batch_cond_uncond: str = option(
        "auto",
        choices=("auto", "on", "off"),
        help="one model call a step with and without the prompt, in place of two: more memory, equal but for rounding "
        "(auto: on a GPU where the weights leave room)",
    )


@dataclass(frozen=True, kw_only=True)
class InferOutput:
    """Output."""

    save_path: Path | None = option(
        None, help="PNG file (or a folder, named without a suffix); all but a merged model needs it"
    )
    output_type: str = option(
        "images",
        choices=("images", "latent", "latent_images"),
        help="what is saved: pictures, latents or both",
    )
    latent_path: tuple[Path, ...] = option(
        (), is_input=True, help="saved latents to decode instead of rendering"
    )
    overwrite: bool = option(False, help="replace files that are there")
    no_metadata: bool = option(False, help="write no settings into the PNG")
    split_attn: bool = option(False, help="changes nothing: one image at a time has no mask")


@dataclass(frozen=True, kw_only=True)
class SheetOptions:
    """What to render."""

    sample_prompts: Path | None = option(
        None, is_input=True, aliases=("prompts",), help="prompt file: txt, toml or json"
    )
    lora_weight: tuple[Path, ...] = option(
        (), is_input=True, help="LoRA files: a column each, beside the base model; a folder is a run's"
    )
    run: tuple[Path, ...] = option(
        (), is_input=True, help="run folder of `train`: each of its checkpoints, in the order of training"
    )
    lora_multiplier: tuple[float, ...] = option((), help="a multiplier each, or one for all (not given: 1)")
    no_base: bool = option(False, help="leave out the column of the base model")
    output_dir: Path | None = option(None, help="folder for the images and `sheet.png`")
    cache_dir: Path | None = option(
        None, help="text cache with the prompts (cache-text --sample_prompts), in place of the text encoders"
    )
