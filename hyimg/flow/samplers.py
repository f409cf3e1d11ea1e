"""Samplers: from noise to image along the flow, `(denoise, x, sigmas, callback, **sampler_args) -> x`.

`denoise(x_BCHW, sigma)` answers with the estimate of the clean latent, guidance applied, float32. The flow's
velocity at x is `(x - estimate) / sigma`. A sampler runs through falling `sigmas` whose last entry is 0, and
calls `callback(step, x, estimate)` after every step. Plugins write functions of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from hyimg.errors import HyimgError, RunError
from hyimg.plugins import describe

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

    Raises RunError, naming the sampler, where it fails or returns anything else. What the model or the
    callback raises under it, and a lack of memory, is not its fault and stays what it is.
    """
    below: list[BaseException] = []

    def watched_denoise(x: Tensor, sigma: float) -> Tensor:
        try:
            return denoise(x, sigma)
        except BaseException as error:
            below.append(error)
            raise

    def watched_callback(step: int, x: Tensor, denoised: Tensor) -> None:
        try:
            if callback is not None:
                callback(step, x, denoised)
        except BaseException as error:
            below.append(error)
            raise

    try:
        result: object = sampler(watched_denoise, x, sigmas, watched_callback, **(arguments or {}))
    except (HyimgError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if error in below:
            raise
        raise RunError(
            f"the sampler `{name}` failed: {describe(error)}",
            hint="choose another `--sampler`, or mend its plugin",
        ) from error
    if not isinstance(result, Tensor):
        raise RunError(f"the sampler `{name}` returned {type(result).__name__}, not a latent")
    if result.shape != x.shape or not result.is_floating_point():
        raise RunError(
            f"the sampler `{name}` returned {result.dtype} of shape {tuple(result.shape)} for a latent of shape "
            f"{tuple(x.shape)}"
        )
    return result.float()
