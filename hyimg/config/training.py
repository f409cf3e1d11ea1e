"""What is trained and how: network, optimiser and schedule, flow matching, loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import Condition, Fact, Given, Only, Unless, option, options_of
from hyimg.config.values import steps_or_share

MAX_RANK = 4096
"""The power of two above the model's width, which bounds the rank of any update."""


_PROBABILITY = "0 is off, 0.1 drops one in ten"


@dataclass(frozen=True, kw_only=True)
class NetworkArgs:
    """Arguments of the network, given as `--network_args "name=value"`."""

    network_reg_dims: str = option(
        "", help="ranks by module, `PATTERN=RANK,...`; rank 0 leaves a module without an adapter"
    )
    network_reg_lrs: str = option(
        "", help="learning rates by module, `PATTERN=RATE,...`; rate 0 freezes the adapter"
    )
    rank_dropout: float = option(
        0.0,
        minimum=0,
        below=1,
        limits=_PROBABILITY,
        help="probability with which each rank is dropped, per image",
    )
    module_dropout: float = option(
        0.0,
        minimum=0,
        below=1,
        limits=_PROBABILITY,
        help="probability with which an adapter is dropped, per batch",
    )
    split_qkv: bool = option(
        False, help="separate adapters for q, k, v and the MLP of a fused weight, each of the full rank"
    )
    loraplus_lr_ratio: float = option(
        1.0,
        above=0,
        limits="it multiplies a learning rate; 16 is usual",
        help="LoRA+ (arXiv 2402.12354): the learning rate of up matrices, as a multiple of the rate",
    )
    loraplus_unet_lr_ratio: float | None = option(
        None,
        above=0,
        limits="it multiplies a learning rate; 16 is usual",
        help="the same, under the reference tool's other name; wins over `loraplus_lr_ratio`",
    )
    dora: bool = option(
        False, help="DoRA (arXiv 2402.09353): the norm of each output row is trained separately"
    )
    rslora: bool = option(False, help="rsLoRA (arXiv 2312.03732): the update is scaled by alpha/sqrt(rank)")
    verbose: bool = option(False, help="list the modules with their ranks and rates")


UNSUPPORTED_NETWORK_ARGS: Mapping[str, str] = {
    "loraplus_text_encoder_lr_ratio": "text encoders are never trained for this model",
    "ggpo_beta": "this regularisation is not implemented",
    "ggpo_sigma": "this regularisation is not implemented",
    "conv_dim": "this model's blocks have no convolutions",
    "conv_alpha": "this model's blocks have no convolutions",
}
"""Arguments of the reference tool's network that are known and not supported, with the reason."""


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """Network."""

    network_dim: int = option(
        4,
        minimum=1,
        maximum=MAX_RANK,
        limits="the layers are 3584 wide, so a higher rank adds nothing",
        help="rank of the adapters",
        needs=(Unless("dim_from_weights"),),
        reference_default=None,
        differs="the same rank, as the network's own default there",
    )
    network_alpha: float = option(
        1.0,
        above=0,
        help="alpha; the update is scaled by alpha/rank",
        needs=(
            Unless("dim_from_weights"),
            Fact("alpha_is_used", "the files of `--network_weights` have their own alphas"),
        ),
    )
    network_args: tuple[str, ...] = option(
        (),
        help='arguments of the network, `"name=value"` (docs/network.md): '
        + ", ".join(opt.name for opt in options_of(NetworkArgs)),
    )
    strict_patterns: bool = option(
        False,
        help="a pattern that matches no module is an error, not a warning",
        needs=(Fact("has_patterns", "`--network_args` has no patterns"),),
    )


@dataclass(frozen=True, kw_only=True)
class NetworkTraining:
    """Network, in training."""

    network_module: str = option(
        "lora",
        synonyms={"networks.lora_hunyuan_image": "lora"},
        reference_default=None,
        differs="required there",
        help="kind of network: lora (the same as the reference tool's `networks.lora_hunyuan_image`), loha, lokr, or "
        "a plugin's name; its arguments go in `--network_args`",
    )
    network_dropout: float = option(
        0.0, minimum=0, maximum=1, help="probability of dropping a value inside an adapter"
    )
    network_train_unet_only: bool = option(
        True,
        reference_default=False,
        differs="text encoders are never trained, in either tool",
        refused={False: "the text encoders are never trained for this model; omit the option"},
        note="always on: the text encoders are never trained for this model",
        help="always on: the text encoders are never trained",
    )
    network_weights: Path | None = option(
        None, is_input=True, help="LoRA file or PEFT folder to start from, in any format that hyimg reads"
    )
    dim_from_weights: bool = option(
        False, help="use the modules, ranks and alphas of the file of `--network_weights`"
    )
    base_weights: tuple[Path, ...] = option(
        (), is_input=True, help="LoRA files or PEFT folders merged into the base model while it loads"
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), help="a multiplier for each file (not given: 1)", needs=(Given("base_weights"),)
    )
    scale_weight_norms: float | None = option(
        None, minimum=0, help="maximum norm of a module's update; 0 is off"
    )


@dataclass(frozen=True, kw_only=True)
class ClassCaptions:
    """Class captions, for `--diff_output_preservation`."""

    trigger_word: str | None = option(
        None,
        help="the word in the captions that names the subject",
        needs=(Given("diff_output_preservation"),),
    )
    diff_output_preservation_class: str | None = option(
        None,
        help="what replaces it in the preserved captions, such as `woman`",
        needs=(Given("diff_output_preservation"),),
    )


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """Prior preservation."""

    blank_prompt_preservation: float | None = option(
        None,
        minimum=0,
        help="weight of a loss that keeps the base model's output for the empty prompt; 1 is usual",
    )
    diff_output_preservation: float | None = option(
        None,
        minimum=0,
        help="weight of a loss that keeps the base model's output for captions with the trigger word replaced",
    )


_RATE_USED = Fact(
    "rate_is_used", 'the optimiser sets its own rate (`--optimizer_args "relative_step=False"`)'
)


def _schedules(*names: str) -> tuple[Condition, ...]:
    return Unless("lr_scheduler_type"), Only("lr_scheduler", *names)


_WITH_WARMUP = (
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "polynomial",
    "inverse_sqrt",
)


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learning rate."""

    learning_rate: float = option(
        1e-4,
        minimum=0,
        help="learning rate",
        needs=(Unless("unet_lr"), _RATE_USED),
        reference_default=2e-6,
        differs="a usual rate for LoRAs",
    )
    unet_lr: float | None = option(
        None,
        minimum=0,
        help="learning rate of the adapters; wins over `--learning_rate`",
        needs=(_RATE_USED,),
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimiser and schedule."""

    optimizer_type: str = option(
        "AdamW",
        means_nothing=("",),
        imports="dotted",
        help="AdamW, AdamW8bit, PagedAdamW8bit, Adafactor, Lion, Lion8bit, Prodigy, CAME, AdamWScheduleFree, "
        "RAdamScheduleFree, SGDNesterov, DAdaptAdam, ... (`hyimg plugins` lists all), or `package.Class`",
    )
    optimizer_args: tuple[str, ...] = option((), help='arguments of the optimiser: `"weight_decay=0.01"`')
    optimizer_schedulefree_wrapper: bool = option(
        False, help="make the optimiser schedule-free with the wrapper of the package schedulefree"
    )
    schedulefree_wrapper_args: tuple[str, ...] = option(
        (),
        help='arguments of the wrapper: `"momentum=0.9"`, `"weight_decay_at_y=0.1"`',
        needs=(Given("optimizer_schedulefree_wrapper"),),
    )
    max_grad_norm: float = option(1.0, minimum=0, help="gradient clipping by norm; 0 is off")
    gradient_accumulation_steps: int = option(1, minimum=1, help="batches per optimiser step")
    lr_scheduler: str = option(
        "constant",
        choices=(
            "constant",
            *_WITH_WARMUP,
            "piecewise_constant",
            "adafactor",
        ),
        help="learning-rate schedule; with `adafactor`, Adafactor sets the rate itself; `piecewise_constant` "
        'takes `--lr_scheduler_args "step_rules=1:100,0.5:200,0.1"`',
        needs=(Unless("lr_scheduler_type"),),
    )
    lr_scheduler_type: str | None = option(
        None,
        imports="dotted",
        help="schedule as `package.Class`, or its name in torch.optim.lr_scheduler; replaces `--lr_scheduler`",
    )
    lr_scheduler_args: tuple[str, ...] = option((), help='arguments of the schedule: `"T_max=1000"`')
    lr_warmup_steps: float = option(
        0,
        minimum=0,
        convert=steps_or_share,
        help="warm-up in steps, or as a share of the run if below 1 (or with a `%`)",
        needs=_schedules(*_WITH_WARMUP),
        means_nothing=(0,),
    )
    lr_decay_steps: float = option(
        0,
        minimum=0,
        convert=steps_or_share,
        help="decay of warmup_stable_decay in steps, or as a share of the run if below 1 (or with a `%`)",
        needs=_schedules("warmup_stable_decay"),
        means_nothing=(0,),
    )
    lr_scheduler_num_cycles: int = option(
        1,
        minimum=1,
        help="cycles of cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay",
        needs=_schedules("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    )
    lr_scheduler_power: float = option(1.0, help="power of polynomial", needs=_schedules("polynomial"))
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        minimum=0,
        maximum=1,
        help="lowest rate of cosine_with_min_lr and warmup_stable_decay, as a share of the rate",
        needs=_schedules("cosine_with_min_lr", "warmup_stable_decay"),
    )
    lr_scheduler_timescale: int | None = option(
        None,
        minimum=1,
        help="timescale of inverse_sqrt in steps (not given: the warm-up)",
        needs=_schedules("inverse_sqrt"),
    )
    fused_backward_pass: bool = option(
        False,
        help="update each parameter during the backward pass and free its gradient; needs `--max_grad_norm 0`",
    )
    full_bf16: bool = option(False, help="store and train the adapters in bf16; small updates may be lost")
    full_fp16: bool = option(False, help="store and train the adapters in fp16; small updates may be lost")


# Samplings that read no `weighting_scheme`; what a plugin's reads is not known
_NO_SCHEME = ("uniform", "sigmoid", "shift", "flux_shift")
_SCHEME_DRAWS = (Unless("timestep_sampling", *_NO_SCHEME),)
# of the built-in losses; of a plugin's, its parameters say it
_HUBER = (Unless("loss_type", "l1", "l2"), Fact("read_by_loss", "the loss does not take it"))


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Flow matching."""

    timestep_sampling: str = option(
        "sigma",
        help="how noise levels are sampled: sigma, uniform, sigmoid, shift, flux_shift, or a plugin's name",
    )
    timestep_sampling_args: tuple[str, ...] = option(
        (), help='arguments of a plugin\'s timestep sampling: `"name=value"`'
    )
    sigmoid_scale: float = option(
        1.0,
        help="scale for sigmoid, shift and flux_shift",
        needs=(Unless("timestep_sampling", "sigma", "uniform"),),
    )
    discrete_flow_shift: float = option(
        5.0,
        above=0,
        help="shift of the noise schedule, for sigma and shift",
        needs=(Unless("timestep_sampling", "uniform", "sigmoid", "flux_shift"),),
    )
    model_prediction_type: str = option(
        "raw", choices=("raw", "additive", "sigma_scaled"), help="what the model's output means"
    )
    weighting_scheme: str = option(
        "uniform",
        choices=("uniform", "none", "sigma_sqrt", "logit_normal", "mode", "cosmap"),
        help="distribution of noise levels (with `sigma` sampling), and loss weight (with `sigma_scaled`)",
        needs=(
            Unless("timestep_sampling", *_NO_SCHEME, when=("logit_normal", "mode")),
            Only("model_prediction_type", "sigma_scaled", when=("sigma_sqrt", "cosmap")),
        ),
    )
    logit_mean: float = option(
        0.0, help="mean for logit_normal", needs=(*_SCHEME_DRAWS, Only("weighting_scheme", "logit_normal"))
    )
    logit_std: float = option(
        1.0,
        above=0,
        help="standard deviation for logit_normal",
        needs=(*_SCHEME_DRAWS, Only("weighting_scheme", "logit_normal")),
    )
    mode_scale: float = option(
        1.29, help="scale for mode", needs=(*_SCHEME_DRAWS, Only("weighting_scheme", "mode"))
    )
    min_timestep: float = option(0, minimum=0, maximum=1000, help="lowest timestep sampled")
    max_timestep: float = option(1000, minimum=0, maximum=1000, help="highest timestep sampled")
    show_timesteps: Path | None = option(
        None, help="plot the noise levels that training would use to this PNG and exit"
    )
    ip_noise_gamma: float | None = option(None, minimum=0, help="input perturbation (try 0.1)")
    ip_noise_gamma_random_strength: bool = option(
        False,
        help="sample its strength between 0 and `--ip_noise_gamma`",
        needs=(Given("ip_noise_gamma"),),
    )


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss."""

    loss_type: str = option("l2", help="l1, l2, huber, smooth_l1, or a plugin's name")
    loss_args: tuple[str, ...] = option((), help='arguments of a plugin\'s loss: `"name=value"`')
    huber_schedule: str = option(
        "constant",
        choices=("constant", "exponential", "snr"),
        reference_default="snr",
        differs="snr does not exist for a flow model, and fails there",
        help="how the Huber threshold follows the noise level (snr does not exist for flow models)",
        refused={"snr": "a flow model has no signal-to-noise schedule; use constant or exponential"},
        needs=_HUBER,
    )
    huber_c: float = option(0.1, above=0, help="Huber threshold", needs=_HUBER)
    huber_scale: float = option(1.0, above=0, help="scale of the Huber threshold", needs=_HUBER)
    masked_loss: bool = option(
        False,
        help="expect masks in the dataset (they are always used if present)",
        needs=(Fact("has_masks", "the dataset has neither `alpha_mask` nor masks in a folder"),),
    )
    prior_loss_weight: float = option(
        1.0,
        minimum=0,
        help="loss weight of regularisation images, where the dataset file sets none",
        needs=(
            Fact("has_regularisation", "the dataset has no regularisation images"),
            Fact("left_to_flags", "the dataset file sets it everywhere"),
        ),
    )
