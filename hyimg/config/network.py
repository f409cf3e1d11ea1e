"""The network that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import option

MAX_RANK = 4096
"""The power of two above the model's width; the rank of a product cannot exceed the narrower side."""


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """Network."""

    network_dim: int = option(
        4,
        minimum=1,
        maximum=MAX_RANK,
        bound_reason="the layers are 3584 wide, so that a higher rank can express nothing more",
        help="rank of the adapters",
    )
    network_alpha: float = option(
        1.0, minimum=0, exclusive_minimum=True, help="alpha; the update is scaled by alpha/rank"
    )
    network_args: tuple[str, ...] = option(
        (),
        help='`"network_reg_dims=PATTERN=RANK,..."`, `"network_reg_lrs=PATTERN=RATE,..."`, and `rank_dropout=P`, '
        "`module_dropout=P`, `split_qkv=True`, `loraplus_lr_ratio=X`, `dora=True`, `rslora=True`",
    )
    strict_patterns: bool = option(False, help="a pattern that matches no module is an error, not a warning")


@dataclass(frozen=True, kw_only=True)
class NetworkTraining:
    """Network, in training."""

    network_module: str = option(
        "lora",
        synonyms={"networks.lora_hunyuan_image": "lora"},
        help="kind of network: lora (the reference tool's `networks.lora_hunyuan_image` is the same), or a plugin's "
        "name, whose own arguments stand in `--network_args`",
    )
    network_dropout: float = option(
        0.0, minimum=0, maximum=1, help="probability with which a value inside an adapter is dropped"
    )
    network_train_unet_only: bool = option(
        True,
        refused={False: "the text encoders are never trained for this model; leave the option out"},
        note="it is always so: the text encoders are never trained for this model",
        help="always so: the text encoders are never trained",
    )
    network_weights: Path | None = option(
        None, is_input=True, help="LoRA file to start from, in any format that hyimg reads"
    )
    dim_from_weights: bool = option(
        False, help="take modules, ranks and alphas from the file of `--network_weights`"
    )
    base_weights: tuple[Path, ...] = option(
        (), is_input=True, help="LoRA files that are merged into the base while it is read"
    )
    base_weights_multiplier: tuple[float, ...] = option((), help="a multiplier for each (not given: 1)")
    scale_weight_norms: float | None = option(
        None, minimum=0, help="largest norm that a module's update may have; 0 is off"
    )


@dataclass(frozen=True, kw_only=True)
class ClassCaptions:
    """Captions of the class, for `--diff_output_preservation`."""

    trigger_word: str | None = option(None, help="the word in the captions that names what is trained")
    diff_output_preservation_class: str | None = option(
        None, help="what stands in its place in the captions that are preserved, say `woman`"
    )


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """Preserving what the base model does."""

    blank_prompt_preservation: float | None = option(
        None, minimum=0, help="weight of a loss that keeps the base's answer to the empty prompt; 1 is usual"
    )
    diff_output_preservation: float | None = option(
        None,
        minimum=0,
        help="weight of a loss that keeps the base's answer to the captions with the trigger word replaced",
    )
