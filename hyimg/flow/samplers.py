"""Samplers: from noise to image along the flow, `(denoise, x, sigmas, callback, **sampler_args) -> x`.

`denoise(x_BCHW, sigma)` answers with the estimate of the clean latent, guidance applied, float32. The flow's
velocity at x is `(x - estimate) / sigma`. A sampler runs through falling `sigmas` whose last entry is 0, and
calls `callback(step, x, estimate)` after every step. Plugins write functions of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

from torch import Tensor

from hyimg.errors import HyimgError, RunError
from hyimg.plugins.guard import check_tensor, guarded

# Shapes: B batch, C latent channels, H W latent height and width

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
Sampler = Callable[..., Tensor]
"""Called `(denoise, x, sigmas, callback, **sampler_args)`; the last are what `--sampler_args` gave."""


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """First order, one model call a step; what the official pipeline uses."""
    levels = sigmas.tolist()
    for step, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        x = x + (x - denoised) / sigma * (next_sigma - sigma)
        if callback:
            callback(step, x, denoised)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Second order, two model calls a step (one in the last): the mean of the velocities at both ends.

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364),
    algorithm 1.
    """
    levels = sigmas.tolist()
    for step, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        velocity = (x - denoised) / sigma
        ahead = x + velocity * (next_sigma - sigma)
        if next_sigma > 0:
            velocity_ahead = (ahead - denoise(ahead, next_sigma)) / next_sigma
            ahead = x + (velocity + velocity_ahead) / 2 * (next_sigma - sigma)
        x = ahead
        if callback:
            callback(step, x, denoised)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Second order, one model call a step: DPM-Solver++(2M) on the flow's path.

    Lu et al., "DPM-Solver++" (arXiv 2211.01095), algorithm 2, with alpha = 1 - sigma, so that the half
    log-SNR is log((1 - sigma) / sigma). It is infinite at both ends: the two steps next to pure noise have no
    past of finite length and the step to 0 has no finite length itself; these are of first order.
    """
    levels = sigmas.tolist()
    last_denoised: Tensor | None = None
    last_length = math.inf
    for step, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        length = _half_log_snr(next_sigma) - _half_log_snr(sigma)
        target = denoised
        if last_denoised is not None and math.isfinite(length) and math.isfinite(last_length):
            target = denoised + length / (2 * last_length) * (denoised - last_denoised)
        ratio = next_sigma / sigma
        x = ratio * x + (1 - ratio) * target
        last_denoised, last_length = denoised, length
        if callback:
            callback(step, x, denoised)
    return x


def _half_log_snr(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    if sigma <= 0:
        return math.inf
    return math.log((1 - sigma) / sigma)


def check_sampler(name: str, *, meanflow: bool) -> None:
    """Refuse the samplers that cannot follow a distilled model; `name` as `Plugins.canonical` gives it.

    A distilled model answers with the mean velocity over a whole step, for which a straight step is exact and
    any correction by a second velocity wrong. Plugins' samplers are trusted to know.
    """
    if meanflow and name in ("heun", "dpm++2m"):
        raise HyimgError(
            f"sampler `{name}` cannot render with a distilled checkpoint, which predicts whole steps",
            hint="use `--sampler euler`",
        )


def run_sampler(
    sampler: Sampler,
    name: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None = None,
    arguments: Mapping[str, object] | None = None,
) -> Tensor:
    """A sampler's result, float32, in the shape of `x`; `name` is what the user called the sampler.

    Raises RunError, naming the sampler, if it fails or returns anything else. What `denoise` or the callback raises
    is not its fault and passes unchanged.
    """
    hint = "choose another `--sampler`, or fix its plugin"
    with guarded(f"the sampler `{name}` failed", hint=hint, error=RunError) as guard:
        result = sampler(
            guard.unblamed(denoise),
            x,
            sigmas,
            guard.unblamed(callback or (lambda step, x, denoised: None)),
            **(arguments or {}),
        )
    return check_tensor(result, x.shape, f"the sampler `{name}` returned", hint=hint, error=RunError).float()
