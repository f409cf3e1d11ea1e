"""A few steps of an optimiser on small parameters, so that what it cannot do is found before the model is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyimg.errors import HyimgError
from hyimg.plugins import describe
from hyimg.randomness import keyed_generator
from hyimg.training.fused_backward import FusedBackward
from hyimg.training.optimizers import Groups, MakeOptimizer

# 4096 elements: bitsandbytes keeps smaller parameters' state in 32 bits whatever its name
_SHAPE = (64, 64)
# So long is RAdam's schedule-free form at rest, and Prodigy before its estimate moves
_NUM_STEPS = 8
# What an adapter of a large model sees; its square is 0 in float16
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
    """Makes and steps the optimiser on a group of two parameters for each of `rates`.

    Raises HyimgError where it refuses its arguments or these groups, fails at a step, or cannot train
    parameters of `dtype`; and with `fused`, where stepping each parameter by itself ends in other weights.
    """
    optimizer = _make(make, name, _groups(rates, dtype, device))
    parameters = _parameters(optimizer)
    before = [p.detach().clone() for p in parameters]
    try:
        for _ in range(_NUM_STEPS):
            for number, parameter in enumerate(parameters):
                parameter.grad = _gradient(number, parameter)
            optimizer.step()
    except Exception as error:
        raise HyimgError(
            f"the optimiser `{name}` cannot make a step: {describe(error)}",
            hint="give every module the same learning rate"
            if len(rates) > 1 and "lr" in str(error).split()
            else "choose another `--optimizer_type`, or mend `--optimizer_args`",
        ) from error
    if dtype != torch.float32:
        _check_precision(name, parameters, before, rates)
    if fused:
        _check_fused(name, optimizer, _make(make, name, _groups(rates, dtype, device)))


def trial_optimizer(make: MakeOptimizer, rates: Sequence[float]) -> Optimizer:
    """The optimiser of small parameters on the CPU, for a schedule to be tried on."""
    return make(_groups(rates, torch.float32, "cpu"), rates[0])


def _make(make: MakeOptimizer, name: str, groups: Groups) -> Optimizer:
    groups = list(groups)
    try:
        made: object = make(groups, groups[0]["lr"])
    except HyimgError:
        raise
    except Exception as error:
        raise HyimgError(
            f"the optimiser `{name}` refuses its arguments: {describe(error)}", hint="mend `--optimizer_args`"
        ) from error
    if not isinstance(made, Optimizer):
        raise HyimgError(f"`{name}` is no optimiser: it makes a {type(made).__name__}")
    return made


def _check_precision(
    name: str, parameters: Sequence[Tensor], before: Sequence[Tensor], rates: Sequence[float]
) -> None:
    kind = "bf16" if parameters[0].dtype == torch.bfloat16 else "fp16"
    hint = f"leave `--full_{kind}` out, or choose an optimiser with a float32 or 8-bit state (AdamW8bit, Adafactor)"
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise HyimgError(
            f"the optimiser `{name}` cannot train weights in {kind}: small gradients make them NaN", hint=hint
        )
    if any(rates) and all(torch.equal(p, start) for p, start in zip(parameters, before, strict=True)):
        raise HyimgError(
            f"the optimiser `{name}` cannot train weights in {kind}: small gradients do not move them",
            hint=hint,
        )


def _check_fused(name: str, plain: Optimizer, other: Optimizer) -> None:
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
            f"`--fused_backward_pass` cannot be used with `{name}`: its step looks at all gradients together",
            hint="leave it out, or choose an optimiser that treats each parameter by itself (AdamW, Adafactor)",
        )


def _numbers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the groups hold beside parameters, tensors as numbers."""
    return [
        {k: v.tolist() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def _groups(rates: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> list[dict[str, Any]]:
    """For each rate a parameter of zeros and a small one, as up and down matrices are."""
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
    """The same at every step, of another size for each parameter."""
    drawn = torch.randn(_SHAPE, generator=keyed_generator("optimizer trial", "gradient", number))
    return (drawn * _GRADIENT * (number + 1)).to(parameter)
