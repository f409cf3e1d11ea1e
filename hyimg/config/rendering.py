"""Rendering: infer and sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyimg.config.option import ABSENT, MAX_SEED, REQUIRED, Fact, Given, Never, option

_WITH_LORA = (Given("lora_weight"),)
# `infer` may also only save a merged model, or decode latents; `sample` and `train` do not have these options
_RENDERS = Given("prompt", "from_file", "from_image", "interactive", "sample_prompts")
_WRITES_PICTURES = Given("prompt", "from_file", "from_image", "interactive", "latent_path")
_GUIDED = (
    Fact("not_distilled", "a distilled model has no unconditional pass"),
    Fact("is_guided", "at guidance 1 there is no unconditional pass"),
)
_LEFT_TO_FLAGS = Fact("left_to_flags", "every prompt sets its own")
_FOR_PROMPTS = (_RENDERS, _LEFT_TO_FLAGS)

NO_APG = 1_000_000
"""A start step beyond the last step of any rendering."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # shift and guidance are the checkpoint's own, 5 and 3.5, distilled 4 and 3.25; over steps that divide 1000, hyimg's
    # schedule is ComfyUI's `simple`
    "comfyui": {
        **dict.fromkeys(("apg_start_step_general", "apg_start_step_ocr"), NO_APG),
        **dict.fromkeys(("sampler", "sampler_args", "flow_shift", "guidance_scale")),
        **dict.fromkeys(("guidance_rescale", "guidance_rescale_apg")),
    },
}
"""What a preset gives the options of `Sampling`; None is an option's default."""


@dataclass(frozen=True, kw_only=True)
class LoRAFiles:
    """LoRA."""

    lora_weight: tuple[Path, ...] = option(
        (), is_input=True, help="LoRA files or PEFT folders, in any format that hyimg reads"
    )
    lora_multiplier: tuple[float, ...] = option((), help="a multiplier for each file (not given: 1)")
    include_patterns: tuple[str, ...] = option(
        (),
        help='a regular expression each: only modules that match are applied (`""`: all)',
        needs=_WITH_LORA,
    )
    exclude_patterns: tuple[str, ...] = option(
        (),
        help='a regular expression each: modules that match are skipped (`""`: none)',
        needs=_WITH_LORA,
    )
    lora_mode: str = option(
        "live",
        choices=("live", "merge"),
        help="live: applied next to the weights, at full precision; merge: added to the weights while they load, and "
        "rounded with them, at no cost per step",
        needs=_WITH_LORA,
        reference_default=ABSENT,
        differs="merges",
    )
    save_merged_model: Path | None = option(
        None,
        help="save the DiT with the LoRAs merged, with the names and types of its file; nothing is rendered without a "
        "prompt",
    )
    lycoris: bool = option(
        False,
        help="no effect: LoHa and LoKr files are detected automatically",
        needs=(Never("LoHa and LoKr files are detected automatically"),),
    )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt."""

    prompt: str | None = option(None, help="what to render; text in double quotes is drawn as letters")
    negative_prompt: str | None = option(
        None,
        help="what to avoid (not given: the empty prompt)",
        needs=(_RENDERS, _LEFT_TO_FLAGS, *_GUIDED),
    )
    from_file: Path | None = option(
        None,
        is_input=True,
        help="prompt file: text lines with --w --h --d --s --l --g --n --fs, TOML or JSON",
    )
    interactive: bool = option(
        False, help="read prompt lines one after another, with the DiT and the VAE kept loaded"
    )
    from_image: Path | None = option(
        None,
        is_input=True,
        help="image made by `infer` or `sample` whose settings are used; flags win over them",
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling."""

    preset: str | None = option(
        None,
        choices=tuple(PRESETS),
        sets=PRESETS,
        help="comfyui: render like ComfyUI (no APG, euler, the schedule `simple`, the checkpoint's shift and "
        "guidance); options that are given win",
    )
    image_size: tuple[int, ...] = option(
        (2048, 2048),
        count=2,
        minimum=32,
        multiple_of=32,
        help="height and width in pixels, multiples of 32",
        needs=_FOR_PROMPTS,
    )
    infer_steps: int | None = option(
        None, minimum=1, help="steps (not given: 50, distilled 8)", needs=_FOR_PROMPTS
    )
    guidance_scale: float | None = option(
        None, minimum=0, help="guidance scale (not given: 3.5, distilled 3.25)", needs=_FOR_PROMPTS
    )
    flow_shift: float | None = option(
        None,
        above=0,
        help="shift of the schedule (not given: 5, distilled 4)",
        needs=_FOR_PROMPTS,
    )
    seed: int | None = option(
        None,
        minimum=0,
        maximum=MAX_SEED,
        help="seed of the noise (not given: random, and recorded)",
        needs=_FOR_PROMPTS,
    )
    sampler: str = option(
        "euler", help="sampler: euler, heun, dpm++2m, or a plugin's name", needs=_FOR_PROMPTS
    )
    sampler_args: tuple[str, ...] = option(
        (), help='arguments of a plugin\'s sampler: `"name=value"`', needs=(_RENDERS,)
    )
    apg_start_step_general: int = option(
        5,
        minimum=0,
        help="step after which APG replaces CFG",
        needs=(_RENDERS, *_GUIDED, Fact("has_plain_prompts", "every prompt has quoted text")),
    )
    apg_start_step_ocr: int = option(
        38,
        minimum=0,
        help="the same for prompts with quoted text",
        needs=(_RENDERS, *_GUIDED, Fact("has_quoted_prompts", "no prompt has quoted text")),
    )
    guidance_rescale: float = option(
        0.0,
        minimum=0,
        maximum=1,
        help="guidance rescale before APG starts",
        needs=(_RENDERS, *_GUIDED),
    )
    guidance_rescale_apg: float = option(
        0.0,
        minimum=0,
        maximum=1,
        help="guidance rescale with APG",
        needs=(_RENDERS, *_GUIDED, Fact("apg_starts", "APG does not start in so few steps")),
    )
    batch_cond_uncond: str = option(
        "auto",
        choices=("auto", "on", "off"),
        help="one model call per step for both passes, with and without the prompt: more memory, equal up to rounding "
        "(auto: on a GPU with enough free memory)",
        needs=(_RENDERS, *_GUIDED),
    )


@dataclass(frozen=True, kw_only=True)
class InferOutput:
    """Output."""

    save_path: Path | None = option(
        None, help="PNG file, or a folder if it has no suffix; required unless only a merged model is saved"
    )
    output_type: str = option(
        "images",
        choices=("images", "latent", "latent_images"),
        help="what to save: images, latents or both",
        needs=(_WRITES_PICTURES,),
    )
    latent_path: tuple[Path, ...] = option(
        (), is_input=True, help="saved latents to decode instead of rendering"
    )
    overwrite: bool = option(False, help="replace existing files")
    no_metadata: bool = option(
        False, help="do not embed the settings in the image", needs=(_WRITES_PICTURES,)
    )
    split_attn: bool = option(
        False,
        help="no effect: one image at a time needs no mask",
        needs=(Never("one image at a time needs no mask"),),
    )


@dataclass(frozen=True, kw_only=True)
class SheetOptions:
    """Prompts, LoRAs and output."""

    sample_prompts: Path = option(
        REQUIRED, is_input=True, aliases=("prompts",), help="prompt file: txt, toml or json"
    )
    lora_weight: tuple[Path, ...] = option(
        (),
        is_input=True,
        help="LoRA files or PEFT folders, one column each next to the base model's; any other folder is a run folder",
    )
    run: tuple[Path, ...] = option(
        (), is_input=True, help="run folder of `train`: all its checkpoints, in training order"
    )
    lora_multiplier: tuple[float, ...] = option(
        (), help="a multiplier for each file or run folder (not given: 1)"
    )
    no_base: bool = option(False, help="no column for the base model")
    output_dir: Path = option(REQUIRED, help="folder for the images and `sheet.png`")
    cache_dir: Path | None = option(
        None, help="text cache with the prompts (cache-text --sample_prompts), instead of the text encoders"
    )
