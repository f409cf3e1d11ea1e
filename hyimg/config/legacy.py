"""The reference tool's flags that hyimg does not have, and how each is handled.

A command line written for that tool either runs or fails with a way out, never with "unknown option". Accepted flags
have no effect, with a note; translated flags become the option that replaces them; refused flags name the one to use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyimg.config.dataset_options import DATASET_FLAGS, dataset_toml
from hyimg.errors import HyimgError, first_few, first_lines

Answer = Literal["accepted", "translated", "refused"]


@dataclass(frozen=True)
class LegacyFlag:
    """`takes_value` says whether a value follows the flag; `becomes` are the option and value that replace
    it (value None: the flag's own); values of the flag are rewritten by `rewrite`; `text` is the note or the reason.

    Of a flag that is refused, `nothing` are the values that change nothing, as other tools' configurations have them;
    `only_with` is a flag without which it does nothing there, and `replaced_by` an option that does its work here.
    Such a flag is taken, with a note."""

    answer: Answer
    text: str
    takes_value: bool = False
    becomes: tuple[str, str | None] | None = None
    rewrite: Callable[[str], str] = str
    nothing: tuple[object, ...] = ()
    only_with: str | None = None
    replaced_by: str | None = None


# the reference tool's names of hyimg's samplers; those of noise prediction (its default among them) become euler
_SAMPLERS = {
    "k_euler": "euler",
    "dpmsolver": "dpm++2m",
    "dpmsolver++": "dpm++2m",
    "dpm++_2m": "dpm++2m",
    **dict.fromkeys(
        (
            *("ddim", "pndm", "lms", "k_lms", "euler_a", "k_euler_a"),
            *("dpm_2", "k_dpm_2", "dpm_2_a", "k_dpm_2_a", "dpmsingle"),
        ),
        "euler",
    ),
}


def _sampler(name: str) -> str:
    """The sampler for a name of the reference tool; `euler` for samplers of noise prediction."""
    return _SAMPLERS.get(name.lower(), name)


def _accepted(text: str, *, takes_value: bool = False) -> LegacyFlag:
    return LegacyFlag("accepted", text, takes_value)


def _becomes(option: str, value: str | None = None) -> LegacyFlag:
    text = f"is `--{option} {value}` here" if value is not None else f"is `--{option}` here"
    return LegacyFlag("translated", text, takes_value=value is None, becomes=(option, value))


def _refused(
    text: str,
    *,
    takes_value: bool = False,
    nothing: tuple[object, ...] = (),
    only_with: str | None = None,
    replaced_by: str | None = None,
) -> LegacyFlag:
    return LegacyFlag(
        "refused", text, takes_value, nothing=nothing, only_with=only_with, replaced_by=replaced_by
    )


_STREAMED = "weights are loaded directly to the device that uses them"
_NOISE = "it is for noise-prediction models, and HunyuanImage is a flow model; omit it"
_DATASET_FILE = "the dataset is described in a file: write one and give it with `--dataset_config`"
_FIXED_VIEW = "it cannot be used with cached latents; omit it"
_FIXED_TEXT = "it cannot be used with cached text; omit it"
_DEEPSPEED = (
    "DeepSpeed is not used, nor is FSDP: the frozen base is not sharded, and the LoRA's gradients are summed by "
    "torch.distributed. `--fp8_scaled` and `--blocks_to_swap` save GPU memory, `--num_processes N` trains on "
    "several GPUs"
)
_PREDICTS_NOISE = "it weights losses of noise-prediction models; omit it"
_CONSOLE = "messages go to stderr: redirect it"

_OTHER_MODELS = "it is for FLUX or Stable Diffusion 3; omit it"
_FILES_AND_RATES_OF_OTHERS = (
    *("clip_l", "clip_g", "t5xxl", "ae", "t5xxl_max_token_length", "t5xxl_device", "t5xxl_dtype"),
    *("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate"),
)
_SWITCHES_OF_OTHERS = (
    *("apply_t5_attn_mask", "apply_lg_attn_mask", "save_clip", "save_t5xxl", "split_mode"),
    "enable_scaled_pos_embed",
)

LEGACY: Mapping[str, LegacyFlag] = {
    "lowram": _accepted(_STREAMED),
    "highvram": _accepted(_STREAMED),
    "no_half_vae": _accepted(
        "latents that overflow are an error that says so; `--mixed_precision no` makes the VAE float32"
    ),
    "mem_eff_attn": _accepted("torch's attention is memory efficient already"),
    "skip_until_initial_step": _accepted(
        "`--initial_step` and `--resume` continue at their step with the same data, without reading earlier batches"
    ),
    "use_safetensors": _accepted("files are always safetensors"),
    "sample_sampler": LegacyFlag(
        "translated",
        "is `--sampler` here; samplers of noise prediction become `euler`, `dpmsolver++` is `dpm++2m`",
        takes_value=True,
        becomes=("sampler", None),
        rewrite=_sampler,
    ),
    "cache_info": _accepted("image sizes are always remembered"),
    "dynamo_backend": _accepted(
        "`--torch_compile` uses inductor; without it, nothing is compiled", takes_value=True
    ),
    "use_8bit_adam": _becomes("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": _becomes("optimizer_type", "Lion"),
    "sdpa": _becomes("attn_mode", "torch"),
    "xformers": _becomes("attn_mode", "xformers"),
    "fp8": _refused(
        "weights in fp8 without scales are not supported; use `--fp8_scaled`", replaced_by="fp8_scaled"
    ),
    "fp8_base": _refused("it is not supported for this model; use `--fp8_scaled`", replaced_by="fp8_scaled"),
    "fp8_base_unet": _refused(
        "it is not supported for this model; use `--fp8_scaled`", replaced_by="fp8_scaled"
    ),
    "v2": _refused("it is for Stable Diffusion 2; omit it"),
    "v_parameterization": _refused("it is for Stable Diffusion 2; omit it"),
    "clip_skip": _refused("this model has no CLIP; omit it", takes_value=True, nothing=(0, 1)),
    "max_token_length": _refused(
        "prompts may always have 1024 tokens; omit it", takes_value=True, nothing=(0, 75)
    ),
    "min_snr_gamma": _refused(_NOISE, takes_value=True, nothing=(0,)),
    "zero_terminal_snr": _refused(_NOISE),
    "noise_offset": _refused(_NOISE, takes_value=True, nothing=(0,)),
    "noise_offset_random_strength": _refused(_NOISE, only_with="noise_offset"),
    "multires_noise_iterations": _refused(_NOISE, takes_value=True, nothing=(0,)),
    "multires_noise_discount": _refused(
        _NOISE, takes_value=True, nothing=(0,), only_with="multires_noise_iterations"
    ),
    "perlin_noise": _refused(_NOISE, takes_value=True, nothing=(0,)),
    "adaptive_noise_scale": _refused(_NOISE, takes_value=True, nothing=(0,), only_with="noise_offset"),
    "network_train_text_encoder_only": _refused("text encoders are never trained for this model"),
    "text_encoder_lr": _refused(
        "text encoders are never trained; use `--unet_lr`", takes_value=True, nothing=(0,)
    ),
    **{
        name: _refused(_DATASET_FILE, takes_value=flag.kind != "switch", nothing=flag.nothing)
        for name, flag in DATASET_FLAGS.items()
    },
    "color_aug": _refused(_FIXED_VIEW),
    "random_crop": _refused(_FIXED_VIEW),
    "face_crop_aug_range": _refused(_FIXED_VIEW, takes_value=True),
    "token_warmup_min": _refused(_FIXED_TEXT, takes_value=True, only_with="token_warmup_step"),
    "token_warmup_step": _refused(_FIXED_TEXT, takes_value=True, nothing=(0,)),
    "dataset_class": _refused("datasets are image folders described in a file; omit it", takes_value=True),
    "debug_dataset": _refused("the caching commands report what they find; omit it"),
    "deepspeed": _refused(_DEEPSPEED),
    "zero_stage": _refused(_DEEPSPEED, takes_value=True),
    "offload_optimizer_device": _refused(_DEEPSPEED, takes_value=True),
    "offload_optimizer_nvme_path": _refused(_DEEPSPEED, takes_value=True),
    "offload_param_device": _refused(_DEEPSPEED, takes_value=True),
    "offload_param_nvme_path": _refused(_DEEPSPEED, takes_value=True),
    "zero3_init_flag": _refused(_DEEPSPEED),
    "zero3_save_16bit_model": _refused(_DEEPSPEED),
    "fp16_master_weights_and_gradients": _refused(_DEEPSPEED),
    "scale_v_pred_loss_like_noise_pred": _refused("it is for Stable Diffusion 2; omit it"),
    "v_pred_like_loss": _refused(_PREDICTS_NOISE, takes_value=True, nothing=(0,)),
    "debiased_estimation_loss": _refused(_PREDICTS_NOISE),
    "weighted_captions": _refused("its text encoder reads sentences, in which brackets are text; omit it"),
    "console_log_level": _accepted(_CONSOLE, takes_value=True),
    "console_log_file": _refused(_CONSOLE, takes_value=True),
    "console_log_simple": _accepted("messages are plain where stderr is no terminal"),
    "log_tracker_config": _refused(
        "W&B reads its settings from its own variables (`WANDB_ENTITY`, `WANDB_TAGS`, `WANDB_NOTES`): set those",
        takes_value=True,
    ),
    "metadata_thumbnail": _refused(
        "put an image with the LoRA's name next to it, which is what tools show", takes_value=True
    ),
    "metadata_preprocessor": _refused("it belongs to ControlNets; omit it", takes_value=True),
    "noise_offset_type": _refused(_NOISE, takes_value=True, nothing=("Original",), only_with="noise_offset"),
    **{name: _refused(_OTHER_MODELS, takes_value=True, nothing=(0,)) for name in _FILES_AND_RATES_OF_OTHERS},
    **{name: _refused(_OTHER_MODELS) for name in _SWITCHES_OF_OTHERS},
    "metadata_is_negative_embedding": _refused("it belongs to embeddings; omit it", takes_value=True),
}


def answer_flags(
    flags: Sequence[tuple[str, Sequence[str]]], given: Collection[str], notes: list[str]
) -> list[tuple[str, str]]:
    """Answers the reference tool's flags of a command line; returns the options, with values, that replace them.

    `flags` are names (keys of `LEGACY`) with the values that followed each, and `given` the options given with them.
    Notes are appended to `notes`. Raises one HyimgError for all refused flags whose values would matter, which shows
    the dataset file that dataset flags make.
    """
    replacements: list[tuple[str, str]] = []
    refused: dict[str, Any] = {}
    for name, values in flags:
        flag = LEGACY[name]
        if flag.answer == "refused":
            mattering = [value for value in values if not is_one_of(value, flag.nothing)]
            without = None if flag.takes_value else True
            refused[name] = mattering[0] if mattering else values[-1] if values else without
            continue
        notes.append(f"`--{name}` {'has no effect here: ' if flag.answer == 'accepted' else ''}{flag.text}")
        if flag.becomes is not None:
            option, fixed = flag.becomes
            replacements.append(
                (option, fixed if fixed is not None else flag.rewrite(values[0] if values else ""))
            )
    others = refused | dict.fromkeys(given, True)
    silent = {name: value for name, value in refused.items() if _says_nothing(LEGACY[name], value, others)}
    if silent:
        shown = [f"`--{name}`" if value is True else f"`--{name} {value}`" for name, value in silent.items()]
        notes.append(f"ignored, since it changes nothing in this run: {first_few(shown, limit=12)}")
    _raise_refusals({name: value for name, value in refused.items() if name not in silent})
    return replacements


def _raise_refusals(refused: Mapping[str, Any]) -> None:
    """Raises one HyimgError for all refused flags, if there are any."""
    dataset = {name: value or "" for name, value in refused.items() if name in DATASET_FLAGS}
    others = [name for name in refused if name not in DATASET_FLAGS]
    lines = [f"`--{name}`: {LEGACY[name].text}" for name in others]
    if dataset:
        raise HyimgError(
            _dataset_answer([f"--{name}" for name in dataset]), details=lines, hint=_dataset_hint(dataset)
        )
    if len(others) == 1:
        raise HyimgError(f"`--{others[0]}` is not for this model", hint=LEGACY[others[0]].text)
    if others:
        raise HyimgError("several flags are not for this model:", details=first_lines(lines, limit=8))


def _dataset_answer(names: Sequence[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    return f"{listed}: the dataset is described in a file, not by {'an option' if len(names) == 1 else 'options'}"


def _dataset_hint(given: Mapping[str, Any]) -> list[str]:
    lines = ("  " + line if line else "" for line in dataset_toml(given))
    return ["save this as `data.toml` and give `--dataset_config data.toml`:", *lines]


def translate_mapping(
    given: Mapping[str, Any], known: frozenset[str], problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """The keys of a run file with the reference tool's answered, as `answer_flags` does for flags."""
    result: dict[str, Any] = {}
    silent = values_that_say_nothing(given, known)
    dataset = {key: value for key, value in given.items() if key in DATASET_FLAGS and key not in known}
    dataset = {key: value for key, value in dataset.items() if key not in silent}
    if dataset:
        problems.append(f"{_dataset_answer(list(dataset))}; {_dataset_hint(dataset)}")
    for key, value in given.items():
        flag = LEGACY.get(key) if key not in known else None
        if flag is None:
            result[key] = value
        elif value is False or key in DATASET_FLAGS or key in silent:
            continue
        elif flag.answer == "refused":
            problems.append(f"`{key}` is not for this model: {flag.text}")
        else:
            notes.append(f"`{key}` {'has no effect here: ' if flag.answer == 'accepted' else ''}{flag.text}")
            if flag.becomes is not None:
                option, fixed = flag.becomes
                result[option] = fixed if fixed is not None else flag.rewrite(value)
    return result


def values_that_say_nothing(given: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The keys of flags that are refused, at values that change nothing."""
    refused = {key: flag for key, flag in LEGACY.items() if flag.answer == "refused" and key not in known}
    return {
        key: value
        for key, value in given.items()
        if key in refused and _says_nothing(refused[key], value, given)
    }


def _says_nothing(flag: LegacyFlag, value: Any, given: Mapping[str, Any]) -> bool:
    items = _listed(value)
    if all(str(item).lower() in ("", "false") or is_one_of(item, flag.nothing) for item in items):
        return True
    if flag.replaced_by is not None and given.get(flag.replaced_by):
        return True
    if flag.only_with is None:
        return False
    other = LEGACY[flag.only_with]
    return flag.only_with not in given or _says_nothing(other, given[flag.only_with], given)


def is_one_of(value: Any, values: tuple[object, ...]) -> bool:
    """Whether a value, as text or as TOML has it, is one of `values`; `0.0` is 0."""
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        try:
            return value in values or float(value) in values
        except ValueError:
            return False
    return value in values if not isinstance(value, (list, tuple)) else False


def written(key: str, value: Any) -> str:
    """A key with its value as a run file has them."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{key} = {text}"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
