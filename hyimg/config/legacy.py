"""Flags of the reference tool that mean something else here, and what each is answered with.

A command line written for that tool either runs or is told the way out; it never fails as "unknown". Flags
that are accepted have no effect here and say so; translated ones become the option that does their work;
refused ones name the option to use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyimg.config.dataset_flags import DATASET_FLAGS, dataset_toml
from hyimg.errors import HyimgError

Answer = Literal["accepted", "translated", "refused"]


@dataclass(frozen=True)
class LegacyFlag:
    """`takes_value` says whether a value follows the flag; `becomes` are the option and value that replace
    it (value None: the flag's own); `adds` names an option of several values that all those of the flag are
    added to; values of the flag are rewritten by `rewrite`; `text` is the note or the reason."""

    answer: Answer
    text: str
    takes_value: bool = False
    becomes: tuple[str, str | None] | None = None
    adds: str | None = None
    rewrite: Callable[[str], str] = str


def _wrapper_argument(pair: str) -> str:
    """An argument of schedulefree's wrapper as one of its AdamW (Defazio et al., arXiv 2405.15682, algorithm 1)."""
    name, equals, value = pair.partition("=")
    if name.strip() == "momentum":
        return f"betas=({value}, 0.999)"
    if name.strip() == "weight_decay_at_y":
        return f"weight_decay={value}"
    return f"{name}{equals}{value}"


# the reference tool's names of samplers that there are here (its own default is another, of noise prediction)
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
    """The sampler that a name of the reference tool means here; Euler's for those of noise prediction alone."""
    return _SAMPLERS.get(name.lower(), name)


def _accepted(text: str, *, takes_value: bool = False) -> LegacyFlag:
    return LegacyFlag("accepted", text, takes_value)


def _becomes(option: str, value: str | None = None) -> LegacyFlag:
    text = f"is `--{option} {value}` here" if value is not None else f"is `--{option}` here"
    return LegacyFlag("translated", text, takes_value=value is None, becomes=(option, value))


def _refused(text: str, *, takes_value: bool = False) -> LegacyFlag:
    return LegacyFlag("refused", text, takes_value)


_STREAMED = "weights are read straight to where they are used"
_NOISE = "it belongs to noise-prediction models, and HunyuanImage learns a flow; leave it out"
_DATASET_FILE = "the dataset is described in a file: write one and give it with `--dataset_config`"
_FIXED_VIEW = "it cannot be used with cached latents; leave it out"
_FIXED_TEXT = "it cannot be used with cached text; leave it out"
_ACCELERATE = "give accelerate a DeepSpeed config instead (`accelerate config`)"
_PREDICTS_NOISE = "it weights losses of noise-prediction models; leave it out"
_CONSOLE = "messages go to stderr: redirect it"

LEGACY: Mapping[str, LegacyFlag] = {
    "lowram": _accepted(_STREAMED),
    "highvram": _accepted(_STREAMED),
    "no_half_vae": _accepted(
        "latents that overflow are an error that says so; `--mixed_precision no` makes the VAE float32"
    ),
    "mem_eff_attn": _accepted("torch's attention is memory efficient by itself"),
    "skip_until_initial_step": _accepted(
        "`--initial_step` and `--resume` go on at their step, whose data is the same, without reading what came before"
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
        "`--torch_compile` uses inductor; without, nothing is compiled", takes_value=True
    ),
    "use_8bit_adam": _becomes("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": _becomes("optimizer_type", "Lion"),
    "sdpa": _becomes("attn_mode", "torch"),
    "xformers": _becomes("attn_mode", "xformers"),
    "fp8": _refused("weights in fp8 without scales are not supported; use `--fp8_scaled`"),
    "fp8_base": _refused("it is not supported for this model; use `--fp8_scaled`"),
    "fp8_base_unet": _refused("it is not supported for this model; use `--fp8_scaled`"),
    "v2": _refused("it belongs to Stable Diffusion 2; leave it out"),
    "v_parameterization": _refused("it belongs to Stable Diffusion 2; leave it out"),
    "clip_skip": _refused("this model has no CLIP; leave it out", takes_value=True),
    "max_token_length": _refused("prompts may have 1024 tokens always; leave it out", takes_value=True),
    "min_snr_gamma": _refused(_NOISE, takes_value=True),
    "zero_terminal_snr": _refused(_NOISE),
    "noise_offset": _refused(_NOISE, takes_value=True),
    "noise_offset_random_strength": _refused(_NOISE),
    "multires_noise_iterations": _refused(_NOISE, takes_value=True),
    "multires_noise_discount": _refused(_NOISE, takes_value=True),
    "perlin_noise": _refused(_NOISE, takes_value=True),
    "adaptive_noise_scale": _refused(_NOISE, takes_value=True),
    "network_train_text_encoder_only": _refused("text encoders are never trained for this model"),
    "text_encoder_lr": _refused("text encoders are never trained; use `--unet_lr`", takes_value=True),
    "optimizer_schedulefree_wrapper": _becomes("optimizer_type", "AdamWScheduleFree"),
    "schedulefree_wrapper_args": LegacyFlag(
        "translated",
        "is added to `--optimizer_args` here, `momentum` as the first of `betas`",
        adds="optimizer_args",
        rewrite=_wrapper_argument,
    ),
    **{
        name: _refused(_DATASET_FILE, takes_value=flag.kind != "switch")
        for name, flag in DATASET_FLAGS.items()
    },
    "color_aug": _refused(_FIXED_VIEW),
    "random_crop": _refused(_FIXED_VIEW),
    "face_crop_aug_range": _refused(_FIXED_VIEW, takes_value=True),
    "token_warmup_min": _refused(_FIXED_TEXT, takes_value=True),
    "token_warmup_step": _refused(_FIXED_TEXT, takes_value=True),
    "dataset_class": _refused(
        "datasets are image folders described in a file; leave it out", takes_value=True
    ),
    "debug_dataset": _refused("the caching commands say what they find; leave it out"),
    "deepspeed": _refused(_ACCELERATE),
    "zero_stage": _refused(_ACCELERATE, takes_value=True),
    "offload_optimizer_device": _refused(_ACCELERATE, takes_value=True),
    "offload_optimizer_nvme_path": _refused(_ACCELERATE, takes_value=True),
    "offload_param_device": _refused(_ACCELERATE, takes_value=True),
    "offload_param_nvme_path": _refused(_ACCELERATE, takes_value=True),
    "zero3_init_flag": _refused(_ACCELERATE),
    "zero3_save_16bit_model": _refused(_ACCELERATE),
    "fp16_master_weights_and_gradients": _refused(_ACCELERATE),
    "scale_v_pred_loss_like_noise_pred": _refused("it belongs to Stable Diffusion 2; leave it out"),
    "v_pred_like_loss": _refused(_PREDICTS_NOISE, takes_value=True),
    "debiased_estimation_loss": _refused(_PREDICTS_NOISE),
    "weighted_captions": _refused(
        "its text encoder reads sentences, in which brackets are text; leave it out"
    ),
    "console_log_level": _accepted(_CONSOLE, takes_value=True),
    "console_log_file": _refused(_CONSOLE, takes_value=True),
    "console_log_simple": _accepted("messages are plain where stderr is no terminal"),
    "log_tracker_config": _refused(
        "W&B reads its settings from its own variables (`WANDB_ENTITY`, `WANDB_TAGS`, `WANDB_NOTES`): set those",
        takes_value=True,
    ),
    "metadata_thumbnail": _refused(
        "put a picture of the LoRA's name beside it, which is what tools show", takes_value=True
    ),
    "metadata_preprocessor": _refused("it belongs to ControlNets; leave it out", takes_value=True),
    "metadata_is_negative_embedding": _refused("it belongs to embeddings; leave it out", takes_value=True),
}


def translate_arguments(arguments: Sequence[str], known: frozenset[str], notes: list[str]) -> list[str]:
    """A command line with the reference tool's flags answered.

    `known` are the option names that the command has itself (underscores, no dashes in front): those win.
    Notes are appended to `notes`. Raises one HyimgError for all refused flags, which shows the dataset file
    that dataset flags make.
    """
    result: list[str] = []
    added: list[str] = []
    refused: list[tuple[str, str]] = []
    dataset: dict[str, Any] = {}
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
        if name in DATASET_FLAGS:
            dataset[name] = value or ""
            continue
        if flag.adds is not None:
            values = [inline] if equals else []
            while index < len(arguments) and not arguments[index].startswith("--"):
                values.append(arguments[index])
                index += 1
            added += [f"--{flag.adds}", *map(flag.rewrite, values)] if values else []
        if flag.answer == "refused":
            refused.append((name, flag.text))
            continue
        notes.append(f"`--{name}` {'has no effect here: ' if flag.answer == 'accepted' else ''}{flag.text}")
        if flag.becomes is not None:
            option, fixed = flag.becomes
            # behind what was typed, so that it wins: the note says that this is what counts
            added += [f"--{option}", fixed if fixed is not None else flag.rewrite(value or "")]
    if dataset:
        lines = [f"`--{name}`: {text}" for name, text in refused]
        raise HyimgError(
            "\n  ".join([_dataset_answer([f"--{name}" for name in dataset]), *lines]),
            hint=_dataset_hint(dataset),
        )
    if len(refused) == 1:
        raise HyimgError(f"`--{refused[0][0]}` is not for this model", hint=refused[0][1])
    if refused:
        lines = [f"`--{name}`: {text}" for name, text in refused]
        raise HyimgError("\n  ".join(["several flags are not for this model:", *lines]))
    return result + added


def _dataset_answer(names: Sequence[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    return f"{listed}: the dataset is described in a file, not by {'an option' if len(names) == 1 else 'options'}"


def _dataset_hint(given: Mapping[str, Any]) -> str:
    lines = ("  " + line if line else "" for line in dataset_toml(given).splitlines())
    return "\n".join(["save this as `data.toml` and give `--dataset_config data.toml`:", *lines])


def translate_mapping(
    given: Mapping[str, Any], known: frozenset[str], problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """The keys of a run file with the reference tool's answered, as `translate_arguments` does for flags."""
    result: dict[str, Any] = {}
    more: dict[str, list[str]] = {}
    dataset = {key: value for key, value in given.items() if key in DATASET_FLAGS and key not in known}
    dataset = {key: value for key, value in dataset.items() if value is not False}
    if dataset:
        problems.append(f"{_dataset_answer(list(dataset))}; {_dataset_hint(dataset)}")
    for key, value in given.items():
        flag = LEGACY.get(key) if key not in known else None
        if flag is None:
            result[key] = value
        elif value is False or key in DATASET_FLAGS:
            continue
        elif flag.answer == "refused":
            problems.append(f"`{key}` is not for this model: {flag.text}")
        else:
            notes.append(f"`{key}` {'has no effect here: ' if flag.answer == 'accepted' else ''}{flag.text}")
            if flag.becomes is not None:
                option, fixed = flag.becomes
                result[option] = fixed if fixed is not None else flag.rewrite(value)
            if flag.adds is not None:
                more[flag.adds] = [flag.rewrite(str(item)) for item in _listed(value)]
    return result | {option: [*_listed(result.get(option, [])), *values] for option, values in more.items()}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
