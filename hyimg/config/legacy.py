"""Flags of the reference tool that mean something else here, and what each is answered with.

A command line written for that tool either runs or is told the way out; it never fails as "unknown". Flags
that are accepted have no effect here and say so; translated ones become the option that does their work;
refused ones name the option to use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyimg.errors import HyimgError

Answer = Literal["accepted", "translated", "refused"]


@dataclass(frozen=True)
class LegacyFlag:
    """`takes_value` says whether a value follows the flag; `becomes` are the option and value that replace
    it (value None: the flag's own); `text` is the note or the reason."""

    answer: Answer
    text: str
    takes_value: bool = False
    becomes: tuple[str, str | None] | None = None


def _accepted(text: str, *, takes_value: bool = False) -> LegacyFlag:
    return LegacyFlag("accepted", text, takes_value)


def _becomes(option: str, value: str | None = None) -> LegacyFlag:
    text = f"is `--{option} {value}` here" if value is not None else f"is `--{option}` here"
    return LegacyFlag("translated", text, takes_value=value is None, becomes=(option, value))


def _refused(text: str, *, takes_value: bool = False) -> LegacyFlag:
    return LegacyFlag("refused", text, takes_value)


_STREAMED = "weights are read straight to where they are used"
_NOISE = "it belongs to noise-prediction models; HunyuanImage learns a flow"
_DATASET_FILE = "the dataset is described in a file: write one and give it with `--dataset_config`"

LEGACY: Mapping[str, LegacyFlag] = {
    "lowram": _accepted(_STREAMED),
    "highvram": _accepted(_STREAMED),
    "no_half_vae": _accepted(
        "latents that overflow are an error that says so; `--mixed_precision no` makes the VAE float32"
    ),
    "mem_eff_attn": _accepted("torch's attention is memory efficient by itself"),
    "skip_until_initial_step": _accepted("a resumed run goes on at its step by itself"),
    "use_safetensors": _accepted("files are always safetensors"),
    "dynamo_backend": _accepted("it has no effect without `--torch_compile`", takes_value=True),
    "use_8bit_adam": _becomes("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": _becomes("optimizer_type", "Lion"),
    "sdpa": _becomes("attn_mode", "torch"),
    "xformers": _becomes("attn_mode", "xformers"),
    "fp8_base": _refused("it is not supported for this model; use `--fp8_scaled`"),
    "fp8_base_unet": _refused("it is not supported for this model; use `--fp8_scaled`"),
    "v2": _refused("it belongs to Stable Diffusion 2; leave it out"),
    "v_parameterization": _refused("it belongs to Stable Diffusion 2; leave it out"),
    "clip_skip": _refused("this model has no CLIP; leave it out", takes_value=True),
    "max_token_length": _refused("prompts may have 1024 tokens always; leave it out", takes_value=True),
    "min_snr_gamma": _refused(f"{_NOISE}; use `--weighting_scheme`", takes_value=True),
    "zero_terminal_snr": _refused(_NOISE),
    "noise_offset": _refused(_NOISE, takes_value=True),
    "noise_offset_random_strength": _refused(_NOISE),
    "multires_noise_iterations": _refused(_NOISE, takes_value=True),
    "multires_noise_discount": _refused(_NOISE, takes_value=True),
    "perlin_noise": _refused(_NOISE, takes_value=True),
    "adaptive_noise_scale": _refused(_NOISE, takes_value=True),
    "network_train_text_encoder_only": _refused("text encoders are never trained for this model"),
    "text_encoder_lr": _refused("text encoders are never trained; use `--unet_lr`", takes_value=True),
    "train_data_dir": _refused(_DATASET_FILE, takes_value=True),
    "reg_data_dir": _refused(_DATASET_FILE, takes_value=True),
    "in_json": _refused(_DATASET_FILE, takes_value=True),
    "resolution": _refused(_DATASET_FILE, takes_value=True),
    "caption_extension": _refused(_DATASET_FILE, takes_value=True),
    "shuffle_caption": _refused(_DATASET_FILE),
    "keep_tokens": _refused(_DATASET_FILE, takes_value=True),
    "enable_bucket": _refused(_DATASET_FILE),
    "flip_aug": _refused(_DATASET_FILE),
    "color_aug": _refused("it cannot be used with cached latents; leave it out"),
    "random_crop": _refused("it cannot be used with cached latents; leave it out"),
    "deepspeed": _refused("give accelerate a DeepSpeed config instead (`accelerate config`)"),
}


def translate_arguments(arguments: Sequence[str], known: frozenset[str], notes: list[str]) -> list[str]:
    """A command line with the reference tool's flags answered.

    `known` are the option names that the command has itself (underscores, no dashes in front): those win.
    Notes are appended to `notes`. Raises one HyimgError for all refused flags.
    """
    result: list[str] = []
    refused: list[tuple[str, str]] = []
    index = 0
    while index < len(arguments):
        word = arguments[index]
        index += 1
        name, equals, inline = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        flag = LEGACY.get(name) if word.startswith("--") and name not in known else None
        if flag is None:
            result.append(word)
            continue
        value = inline if equals else None
        if (
            flag.takes_value
            and value is None
            and index < len(arguments)
            and not arguments[index].startswith("--")
        ):
            value = arguments[index]
            index += 1
        if flag.answer == "refused":
            refused.append((name, flag.text))
            continue
        notes.append(f"`--{name}` {'has no effect here: ' if flag.answer == 'accepted' else ''}{flag.text}")
        if flag.becomes is not None:
            option, fixed = flag.becomes
            result += [f"--{option}", fixed if fixed is not None else (value or "")]
    if len(refused) == 1:
        raise HyimgError(f"`--{refused[0][0]}` is not for this model", hint=refused[0][1])
    if refused:
        lines = [f"`--{name}`: {text}" for name, text in refused]
        raise HyimgError("\n  ".join(["several flags are not for this model:", *lines]))
    return result


def translate_mapping(
    given: Mapping[str, Any], known: frozenset[str], problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """The keys of a run file with the reference tool's answered, as `translate_arguments` does for flags."""
    result: dict[str, Any] = {}
    for key, value in given.items():
        flag = LEGACY.get(key) if key not in known else None
        if flag is None:
            result[key] = value
        elif value is False:
            continue
        elif flag.answer == "refused":
            problems.append(f"`{key}` is not for this model: {flag.text}")
        else:
            notes.append(f"`{key}` {'has no effect here: ' if flag.answer == 'accepted' else ''}{flag.text}")
            if flag.becomes is not None:
                option, fixed = flag.becomes
                result[option] = fixed if fixed is not None else value
    return result
