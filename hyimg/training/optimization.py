"""Optimiser, LR scheduler and adapter precision of a run, checked together, and tried on small parameters.

The trial finds what an optimiser cannot do before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyimg.config.commands import TrainConfig
from hyimg.config.training import Optimizer as OptimizerOptions
from hyimg.errors import HyimgError
from hyimg.lora.rank_plan import ModulePlan
from hyimg.memory.precision import Precision
from hyimg.plugins import Plugins
from hyimg.plugins.guard import guarded
from hyimg.randomness import keyed_generator
from hyimg.report import Reporter
from hyimg.training.optimizers import (
    Groups,
    MakeOptimizer,
    base_of,
    has_modes,
    makes_own_rate,
    resolve_optimizer,
)
from hyimg.training.schedulers import (
    MakeScheduler,
    check_scheduler_fits,
    resolve_scheduler,
    try_scheduler,
    warmup_warning,
)
from hyimg.training.stepping import FusedBackward, LossScaler, Stepper

# 4096 elements: bitsandbytes keeps smaller parameters' state in 32 bits whatever its name
_SHAPE = (64, 64)
# As many as schedule-free RAdam and Prodigy take before the weights move
_NUM_STEPS = 8
# Typical for an adapter of a large model; its square is 0 in float16
_GRADIENT = 1e-5


def try_optimizer(
    make: MakeOptimizer,
    name: str,
    *,
    rates: Sequence[float],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    fused: bool = False,
) -> None:
    """Creates and steps the optimiser with a group of two parameters for each of `rates`.

    Raises HyimgError if it rejects its arguments or these groups, fails at a step, or cannot train parameters of
    `dtype`; with `fused`, also if stepping each parameter separately gives different weights.
    """
    optimizer = _make(make, name, _groups(rates, dtype, device))
    parameters = _parameters(optimizer)
    before = [p.detach().clone() for p in parameters]
    hint = "choose another `--optimizer_type`, or change `--optimizer_args`"
    if len(rates) > 1:
        hint = f"give every module the same learning rate, {hint}"
    with guarded(f"the optimiser `{name}` cannot make a step", hint=hint):
        for _ in range(_NUM_STEPS):
            for number, parameter in enumerate(parameters):
                parameter.grad = _gradient(number, parameter)
            optimizer.step()
    if dtype != torch.float32:
        _check_precision(name, parameters, before, rates)
    if fused:
        _check_fused_step(name, optimizer, _make(make, name, _groups(rates, dtype, device)))


def trial_optimizer(make: MakeOptimizer, rates: Sequence[float]) -> Optimizer:
    """An optimiser of small parameters on the CPU, to try an LR scheduler on."""
    return make(_groups(rates, torch.float32, "cpu"), rates[0])


def _make(make: MakeOptimizer, name: str, groups: Groups) -> Optimizer:
    groups = list(groups)
    with guarded(f"the optimiser `{name}` rejects its arguments", hint="change `--optimizer_args`"):
        made: object = make(groups, groups[0]["lr"])
    if not isinstance(made, Optimizer):
        raise HyimgError(f"`{name}` is not an optimiser: it returns a {type(made).__name__}")
    return made


def _check_precision(
    name: str, parameters: Sequence[Tensor], before: Sequence[Tensor], rates: Sequence[float]
) -> None:
    kind = "bf16" if parameters[0].dtype == torch.bfloat16 else "fp16"
    hint = f"leave out `--full_{kind}`, or choose an optimiser with float32 or 8-bit state (AdamW8bit, Adafactor)"
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise HyimgError(
            f"the optimiser `{name}` cannot train weights in {kind}: small gradients make them NaN", hint=hint
        )
    if any(rates) and all(torch.equal(p, start) for p, start in zip(parameters, before, strict=True)):
        raise HyimgError(
            f"the optimiser `{name}` cannot train weights in {kind}: small gradients do not move them",
            hint=hint,
        )


def _check_fused_step(name: str, plain: Optimizer, other: Optimizer) -> None:
    fused = FusedBackward(other)
    parameters = _parameters(other)
    for _ in range(_NUM_STEPS):
        # the gradient of this sum is the one that the plain steps were given; the last comes first
        products = [(p * _gradient(number, p)).sum() for number, p in enumerate(parameters)]
        torch.autograd.backward(torch.stack(products).sum())
        fused.finish()
    fused.remove()
    same = all(torch.equal(a, b) for a, b in zip(_parameters(plain), parameters, strict=True))
    if not same or _numbers(plain) != _numbers(other):
        raise HyimgError(
            f"`--fused_backward_pass` cannot be used with `{name}`: its step uses all gradients together",
            hint="leave it out, or choose an optimiser that treats parameters separately (AdamW, Adafactor)",
        )


def _numbers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The values of the groups other than parameters, tensors as numbers."""
    return [
        {k: v.tolist() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def _groups(rates: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> list[dict[str, Any]]:
    """For each rate a zero and a small parameter, like up and down matrices."""
    groups = []
    for number, rate in enumerate(rates):
        small = 0.02 * torch.rand(_SHAPE, generator=keyed_generator("optimizer trial", "weight", number))
        values = (torch.zeros(_SHAPE), small)
        parameters = [torch.nn.Parameter(value.to(device, dtype)) for value in values]
        groups.append({"params": parameters, "lr": rate})
    return groups


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _gradient(number: int, parameter: Tensor) -> Tensor:
    """The same at every step, of a different magnitude for each parameter."""
    drawn = torch.randn(_SHAPE, generator=keyed_generator("optimizer trial", "gradient", number))
    return (drawn * _GRADIENT * (number + 1)).to(parameter)


# Prodigy and D-Adaptation expect rates around 1: they only scale the rate that is found
_ADAPTIVE_RATE = 0.1


@dataclass(frozen=True)
class Optimization:
    """Optimiser and LR scheduler of a run, checked. `learning_rate` is for modules without their own, `rates` are all
    rates in the network."""

    options: OptimizerOptions
    make_optimizer: MakeOptimizer
    make_scheduler: MakeScheduler
    learning_rate: float
    rates: tuple[float, ...]
    precision: Precision

    @property
    def makes_own_rate(self) -> bool:
        """Whether the optimiser computes its own rate and ignores the given one."""
        return makes_own_rate(trial_optimizer(self.make_optimizer, self.rates))

    @property
    def averages_weights(self) -> bool:
        """Whether the optimiser keeps averages of the weights, which are saved."""
        return has_modes(trial_optimizer(self.make_optimizer, self.rates))

    def check_length(self, num_steps: int, report: Reporter) -> None:
        """Raises HyimgError if the LR scheduler does not work for that many steps."""
        try_scheduler(
            self.make_scheduler, self.options, trial_optimizer(self.make_optimizer, self.rates), num_steps
        )
        if (warning := warmup_warning(self.options, num_steps)) is not None:
            report.warning(warning)

    def stepper(self, groups: Sequence[dict[str, Any]], num_steps: int) -> Stepper:
        """The optimiser of the network's parameter groups, with LR scheduler, clipping and loss scaling."""
        options = self.options
        optimizer = self.make_optimizer(groups, self.learning_rate)
        return Stepper(
            optimizer,
            max_grad_norm=options.max_grad_norm,
            scheduler=self.make_scheduler(optimizer, num_steps),
            scaler=LossScaler() if self.precision.mixed_precision == "fp16" else None,
            fused=FusedBackward(optimizer) if options.fused_backward_pass else None,
        )


def prepare_optimization(
    config: TrainConfig,
    plugins: Plugins,
    plan: Sequence[ModulePlan],
    precision: Precision,
    report: Reporter,
    *,
    loraplus_lr_ratio: float = 1.0,
) -> Optimization:
    """Resolves optimiser and LR scheduler and tries them on small parameters on the run's device.

    Raises HyimgError for the first thing that is wrong, and warns of options without effect.
    """
    options = config.optimizer
    name = options.optimizer_type
    rate = config.rate
    learning_rate = rate.unet_lr if rate.unet_lr is not None else rate.learning_rate
    device, dtype = precision.device, precision.adapters
    _check_fused(options, precision, on_nan=config.saving.on_nan)
    make_optimizer = resolve_optimizer(
        plugins,
        name,
        options.optimizer_args,
        wrapper_pairs=options.schedulefree_wrapper_args if options.optimizer_schedulefree_wrapper else None,
    )
    make_scheduler = resolve_scheduler(options)
    rates = _rates(plan, learning_rate, loraplus_lr_ratio)
    try_optimizer(
        make_optimizer, name, rates=rates, dtype=dtype, device=device, fused=options.fused_backward_pass
    )
    trial = trial_optimizer(make_optimizer, rates)
    check_scheduler_fits(options, trial)
    if config.duration.max_train_epochs is None and config.duration.max_train_steps is not None:
        # otherwise the length depends on the dataset, which is not known yet
        try_scheduler(make_scheduler, options, trial, config.duration.max_train_steps)
    _warn(name, trial, rates, device, report)
    if options.optimizer_schedulefree_wrapper and base_of(trial) is trial:
        report.warning(f"`--optimizer_schedulefree_wrapper` has no effect: `{name}` is schedule-free already")
    return Optimization(options, make_optimizer, make_scheduler, learning_rate, rates, precision)


def _rates(
    plan: Sequence[ModulePlan], learning_rate: float, loraplus_lr_ratio: float = 1.0
) -> tuple[float, ...]:
    """The rates that the network's parameter groups will have, the run's own first."""
    own = [module.learning_rate for module in plan if module.rank and module.learning_rate != 0]
    downs = [learning_rate if rate is None else rate for rate in own]
    found = dict.fromkeys([*downs, *(rate * loraplus_lr_ratio for rate in downs)])
    return tuple(sorted(found, key=lambda rate: rate != learning_rate))


def _check_fused(options: OptimizerOptions, precision: Precision, *, on_nan: str) -> None:
    if not options.fused_backward_pass:
        return
    for excluded, what, way_out in (
        (
            options.gradient_accumulation_steps > 1,
            "`--gradient_accumulation_steps`: it frees each gradient before the next batch is added",
            "use a larger `batch_size` in the dataset file",
        ),
        (
            bool(options.max_grad_norm),
            "gradient clipping, which needs the norm of all gradients first",
            "give `--max_grad_norm 0`",
        ),
        (
            precision.mixed_precision == "fp16",
            "`--mixed_precision fp16`"
            + (", which `auto` chooses on this GPU," if precision.is_auto else ",")
            + " whose gradients must be checked for overflow first",
            "use `--mixed_precision bf16` or `no`",
        ),
        (
            on_nan == "skip",
            "`--on_nan skip`: weights change before all gradients are known",
            "use only one of the two",
        ),
    ):
        if excluded:
            raise HyimgError(f"`--fused_backward_pass` cannot be used with {what}", hint=way_out)


def _warn(
    name: str, optimizer: Optimizer, rates: Sequence[float], device: torch.device, report: Reporter
) -> None:
    group = optimizer.param_groups[0]
    if makes_own_rate(optimizer):
        # `--learning_rate` and `--unet_lr` have their own warning
        if len(rates) > 1:
            report.warning(
                f"`{name}` computes its own rate: rates by pattern are ignored "
                '(`--optimizer_args "relative_step=False"` uses them)'
            )
    elif "d" in group and max(rates) <= _ADAPTIVE_RATE:
        report.warning(
            f"`{name}` finds the rate itself and multiplies it by the given one, {max(rates):g}: use about 1"
        )
    if name.lower() == "sgdnesterov8bit":
        report.warning(f"`{name}` is SGD with plain momentum: bitsandbytes has no Nesterov momentum")
    if getattr(base_of(optimizer), "is_paged", False) and device.type == "cpu":
        report.warning(f"`{name}`: paging has no effect on a CPU")
