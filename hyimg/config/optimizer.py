"""Optimiser and learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from hyimg.config.option import option


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learning rate."""

    learning_rate: float = option(1e-4, minimum=0, help="learning rate")
    unet_lr: float | None = option(None, minimum=0, help="the adapters' learning rate, where it differs")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimiser and schedule."""

    optimizer_type: str = option(
        "AdamW",
        help="AdamW, AdamW8bit, PagedAdamW8bit, Adafactor, Lion, Lion8bit, Prodigy, CAME, AdamWScheduleFree, "
        "RAdamScheduleFree, SGDNesterov, ... (`hyimg plugins` lists them), or `package.Class`",
    )
    optimizer_args: tuple[str, ...] = option((), help='arguments of the optimiser: `"weight_decay=0.01"`')
    max_grad_norm: float = option(1.0, minimum=0, help="gradient clipping by norm; 0 is off")
    gradient_accumulation_steps: int = option(1, minimum=1, help="batches to a step")
    lr_scheduler: str = option(
        "constant",
        choices=(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "cosine_with_min_lr",
            "warmup_stable_decay",
            "polynomial",
            "inverse_sqrt",
            "adafactor",
        ),
        help="learning-rate schedule; `adafactor` is the rate that Adafactor makes itself",
    )
    lr_scheduler_type: str | None = option(
        None, help="schedule by `package.Class`, or by its name in torch.optim.lr_scheduler, in its place"
    )
    lr_scheduler_args: tuple[str, ...] = option((), help='arguments of the schedule: `"T_max=1000"`')
    lr_warmup_steps: float = option(
        0, minimum=0, steps_or_share=True, help="warm-up, in steps, or below 1 as a share of the run"
    )
    lr_decay_steps: float = option(
        0,
        minimum=0,
        steps_or_share=True,
        help="decay of warmup_stable_decay, in steps, or below 1 as a share of the run",
    )
    lr_scheduler_num_cycles: int = option(
        1, minimum=1, help="cycles of cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay"
    )
    lr_scheduler_power: float = option(1.0, help="power of polynomial")
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        minimum=0,
        maximum=1,
        help="lowest rate of cosine_with_min_lr and warmup_stable_decay, as a share of the rate",
    )
    lr_scheduler_timescale: int | None = option(
        None, minimum=1, help="steps in which inverse_sqrt falls (not given: the warm-up's)"
    )
    fused_backward_pass: bool = option(
        False,
        help="step each parameter in the backward pass and free its gradient; needs `--max_grad_norm 0`",
    )
    full_bf16: bool = option(
        False, help="hold and train the adapters themselves in bf16; small steps may be lost"
    )
    full_fp16: bool = option(
        False, help="hold and train the adapters themselves in fp16; small steps may be lost"
    )
