"""Optimiser and learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from hyimg.config.option import option

_TRAINING = "leave it out for now"


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learning rate."""

    learning_rate: float = option(1e-4, minimum=0, help="learning rate")
    unet_lr: float | None = option(None, minimum=0, help="the adapters' learning rate, where it differs")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimiser and schedule."""

    optimizer_type: str = option(
        "AdamW", help="AdamW, AdamW8bit, Adafactor, ..., `package.Class`, or a plugin's name"
    )
    optimizer_args: tuple[str, ...] = option((), help='arguments of the optimiser: `"weight_decay=0.01"`')
    max_grad_norm: float = option(1.0, minimum=0, help="gradient clipping by norm; 0 is off")
    gradient_accumulation_steps: int = option(1, minimum=1, help="batches to a step")
    lr_scheduler: str = option("constant", help="learning-rate schedule", later="use constant")
    lr_scheduler_type: str | None = option(None, help="schedule by `package.Class`", later=_TRAINING)
    lr_scheduler_args: tuple[str, ...] = option((), help="its arguments", later=_TRAINING)
    lr_warmup_steps: float = option(0, minimum=0, help="warm-up, in steps or as a fraction", later=_TRAINING)
    lr_decay_steps: float = option(0, minimum=0, help="decay, in steps or as a fraction", later=_TRAINING)
    lr_scheduler_num_cycles: int = option(1, minimum=1, help="restarts of a cosine schedule", later=_TRAINING)
    lr_scheduler_power: float = option(1.0, help="power of a polynomial schedule", later=_TRAINING)
    lr_scheduler_min_lr_ratio: float | None = option(None, minimum=0, help="lowest rate", later=_TRAINING)
    lr_scheduler_timescale: int | None = option(None, minimum=1, help="of inverse_sqrt", later=_TRAINING)
    fused_backward_pass: bool = option(
        False, help="step each parameter in the backward pass", later=_TRAINING
    )
    full_bf16: bool = option(False, help="train the adapters themselves in bf16", later=_TRAINING)
    full_fp16: bool = option(False, help="train the adapters themselves in fp16", later=_TRAINING)
