"""A hyimg plugin: the loss `frequency` and the sampler `midpoint`.

Shapes: B batch, C latent channels, H W latent height and width
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyimg.hookspecs import Provided, hookimpl

if TYPE_CHECKING:
    from hyimg.flow.losses import LossContext


@hookimpl
def hyimg_losses() -> Provided:
    return {"frequency": frequency}


@hookimpl
def hyimg_samplers() -> Provided:
    return {"midpoint": midpoint}


def frequency(prediction: Tensor, target: Tensor, context: LossContext, *, gain: float = 2.0) -> Tensor:
    """Mean squared error, each spatial frequency weighted from 1 (flat) to `gain` (finest); shape B.

    By Parseval's theorem a gain of 1 is the plain mean squared error.
    """
    spectrum_BCHW = torch.fft.fft2((prediction - target).float(), norm="ortho")
    height, width = prediction.shape[-2:]
    rows_H1 = torch.fft.fftfreq(height, device=prediction.device)[:, None]
    columns_W = torch.fft.fftfreq(width, device=prediction.device)
    # 0 at frequency zero, 1 at the corner of the spectrum
    distance_HW = torch.sqrt((rows_H1**2 + columns_W**2) / 0.5)
    weight_HW = 1 + (gain - 1) * distance_HW
    loss_B: Tensor = (weight_HW * spectrum_BCHW.abs().square()).flatten(1).mean(1)
    return loss_B


def midpoint(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Tensor,
    callback: Callable[[int, Tensor, Tensor], None] | None,
) -> Tensor:
    """The explicit midpoint method on dx/dsigma = (x - denoised) / sigma."""
    levels = sigmas.tolist()
    for step, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        middle = (sigma + next_sigma) / 2
        x_middle = x + (middle - sigma) * (x - denoised) / sigma
        slope = (x_middle - denoise(x_middle, middle)) / middle
        x = x + (next_sigma - sigma) * slope
        if callback is not None:
            callback(step, x, denoised)
    return x
