"""How a run is optimised: optimiser, schedule and precision of the adapters, checked together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from hyimg.config.commands import TrainConfig
from hyimg.errors import HyimgError
from hyimg.lora.plan import ModulePlan
from hyimg.plugins import Plugins
from hyimg.report import Reporter
from hyimg.training.fused_backward import FusedBackward
from hyimg.training.loss_scaler import LossScaler
from hyimg.training.optimizer_trial import trial_optimizer, try_optimizer
from hyimg.training.optimizers import MakeOptimizer, has_modes, makes_own_rate, resolve_optimizer
from hyimg.training.schedulers import (
    MakeSchedule,
    check_schedule_fits,
    resolve_scheduler,
    schedule_warnings,
    try_schedule,
)
from hyimg.training.stepping import Stepper

# Where Prodigy and D-Adaptation want the rate, which only scales the one that they find
_ADAPTIVE_RATE = 0.1


@dataclass(frozen=True)
class Optimization:
    """A checked choice. `learning_rate` is that of modules without one of their own, `rates` are all rates
    that the network's modules have, `adapter_dtype` the type that adapters are held and trained in."""

    config: TrainConfig
    make_optimizer: MakeOptimizer
    make_schedule: MakeSchedule
    learning_rate: float
    rates: tuple[float, ...]
    adapter_dtype: torch.dtype

    @property
    def averages_weights(self) -> bool:
        """Whether the optimiser keeps averages of the weights, which are what is saved."""
        return has_modes(trial_optimizer(self.make_optimizer, self.rates))

    def check_length(self, num_steps: int, report: Reporter) -> None:
        """Raises HyimgError where the schedule cannot be followed for so many steps."""
        options = self.config.optimizer
        try_schedule(self.make_schedule, options, trial_optimizer(self.make_optimizer, self.rates), num_steps)
        for sentence in schedule_warnings(options, num_steps):
            report.warning(sentence)

    def stepper(self, groups: Sequence[dict[str, Any]], num_steps: int) -> Stepper:
        """The optimiser of the network's parameter groups with all that belongs to a step."""
        options = self.config.optimizer
        optimizer = self.make_optimizer(groups, self.learning_rate)
        return Stepper(
            optimizer,
            max_grad_norm=options.max_grad_norm,
            scheduler=self.make_schedule(optimizer, num_steps),
            scaler=LossScaler() if self.config.compute.mixed_precision == "fp16" else None,
            fused=FusedBackward(optimizer) if options.fused_backward_pass else None,
        )


def prepare_optimization(
    config: TrainConfig,
    plugins: Plugins,
    plan: Sequence[ModulePlan],
    *,
    device: torch.device,
    report: Reporter,
    loraplus_lr_ratio: float = 1.0,
) -> Optimization:
    """Resolves and tries what the options name, on small parameters on `device`.

    Raises HyimgError for the first thing that is wrong, and warns of what has no effect.
    """
    options = config.optimizer
    name = options.optimizer_type
    rate = config.rate
    learning_rate = rate.unet_lr if rate.unet_lr is not None else rate.learning_rate
    dtype = _adapter_dtype(config)
    _check_fused(config)
    make_optimizer = resolve_optimizer(plugins, name, options.optimizer_args)
    make_schedule = resolve_scheduler(options)
    rates = _rates(plan, learning_rate, loraplus_lr_ratio)
    try_optimizer(
        make_optimizer, name, rates=rates, dtype=dtype, device=device, fused=options.fused_backward_pass
    )
    trial = trial_optimizer(make_optimizer, rates)
    check_schedule_fits(options, trial)
    if config.duration.max_train_epochs is None and config.duration.max_train_steps is not None:
        # else the length follows from the dataset, which is not known yet
        try_schedule(make_schedule, options, trial, config.duration.max_train_steps)
    _warn(name, trial, rates, device, report)
    return Optimization(config, make_optimizer, make_schedule, learning_rate, rates, dtype)


def _rates(
    plan: Sequence[ModulePlan], learning_rate: float, loraplus_lr_ratio: float = 1.0
) -> tuple[float, ...]:
    """The rates that the network's parameter groups will have, the run's own first."""
    own = [module.learning_rate for module in plan if module.rank and module.learning_rate != 0]
    downs = [learning_rate if rate is None else rate for rate in own]
    found = dict.fromkeys([*downs, *(rate * loraplus_lr_ratio for rate in downs)])
    return tuple(sorted(found, key=lambda rate: rate != learning_rate))


def _adapter_dtype(config: TrainConfig) -> torch.dtype:
    options, precision = config.optimizer, config.compute.mixed_precision
    for flag, kind, dtype in (
        (options.full_bf16, "bf16", torch.bfloat16),
        (options.full_fp16, "fp16", torch.float16),
    ):
        if flag and precision != kind:
            raise HyimgError(
                f"`--full_{kind}` needs `--mixed_precision {kind}`, which is `{precision}`",
                hint=f"leave `--full_{kind}` out, or give both",
            )
        if flag:
            return dtype
    return torch.float32


def _check_fused(config: TrainConfig) -> None:
    options = config.optimizer
    if not options.fused_backward_pass:
        return
    for excluded, what, way_out in (
        (
            options.gradient_accumulation_steps > 1,
            "`--gradient_accumulation_steps`: a gradient is used up before the next batch adds to it",
            "use a larger `batch_size` in the dataset file",
        ),
        (
            bool(options.max_grad_norm),
            "gradient clipping, which needs the norm of the whole gradient first",
            "give `--max_grad_norm 0`",
        ),
        (
            config.compute.mixed_precision == "fp16",
            "`--mixed_precision fp16`, whose gradients may overflow and are looked at first",
            "use `--mixed_precision bf16`",
        ),
        (
            config.saving.on_nan == "skip",
            "`--on_nan skip`: weights have moved before the whole gradient is known",
            "leave one of the two out",
        ),
    ):
        if excluded:
            raise HyimgError(f"`--fused_backward_pass` cannot be used with {what}", hint=way_out)


def _warn(
    name: str, optimizer: Optimizer, rates: Sequence[float], device: torch.device, report: Reporter
) -> None:
    group = optimizer.param_groups[0]
    if makes_own_rate(optimizer):
        report.warning(
            f"`{name}` makes its own rate: `--learning_rate`, `--unet_lr` and rates by pattern are not used "
            '(`--optimizer_args "relative_step=False"` uses them)'
        )
    elif "d" in group and max(rates) <= _ADAPTIVE_RATE:
        report.warning(
            f"`{name}` finds the rate itself and multiplies it by the one given, {max(rates):g}: give about 1"
        )
    if getattr(optimizer, "is_paged", False) and device.type == "cpu":
        report.warning(f"`{name}` is as without pages: there is no GPU memory to spare")
