"""A hyimg plugin: the sampler `midpoint`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.hookspecs import Provided, hookimpl


@hookimpl
def hyimg_samplers() -> Provided:
    return {"midpoint": midpoint}


def midpoint(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Tensor,
    callback: Callable[[int, Tensor, Tensor], None] | None,
    *,
    position: float = 0.5,
) -> Tensor:
    """The explicit two-stage methods of the second order on dx/dsigma = (x - denoised) / sigma.

    `position` is where in the step the second stage stands: 1/2 is the midpoint method, 2/3 Ralston's (Ralston
    1962, Mathematics of Computation 16). Raises HyimgError for one that is not above 0 and below 1.
    """
    if not 0 < position < 1:
        raise HyimgError(
            f"`position` of the sampler `midpoint` is {position:g}", hint="it is above 0 and below 1"
        )
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        first = (x - denoised) / sigma
        between = sigma + position * (next_sigma - sigma)
        x_between = x + (between - sigma) * first
        second = (x_between - denoise(x_between, between)) / between
        weight = 1 / (2 * position)
        x = x + (next_sigma - sigma) * ((1 - weight) * first + weight * second)
        if callback is not None:
            callback(step, x, denoised)
    return x
