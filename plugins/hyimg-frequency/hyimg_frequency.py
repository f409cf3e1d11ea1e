"""A hyimg plugin: the loss `frequency`.

Shapes: B batch, C latent channels, H W latent height and width
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.hookspecs import Provided, hookimpl

if TYPE_CHECKING:
    from hyimg.flow.losses import LossContext


@hookimpl
def hyimg_losses() -> Provided:
    return {"frequency": frequency}


def frequency(prediction: Tensor, target: Tensor, context: LossContext, *, gain: float = 2.0) -> Tensor:
    """Mean squared error, each spatial frequency weighted from 1 (flat) to `gain` (finest); shape B.

    By Parseval's theorem a gain of 1 is the plain mean squared error. What a mask leaves out does not count, and
    the mean is over what it lets count. Raises HyimgError for a negative gain.
    """
    if gain < 0:
        raise HyimgError(
            f"`gain` of the loss `frequency` is {gain:g}", hint="1 weights all alike, more weights detail up"
        )
    difference_BCHW = (prediction - target).float()
    area_B = difference_BCHW.new_ones(len(difference_BCHW))
    if context.weight_map is not None:
        # the square of the root is the weight, so that a gain of 1 stays the weighted mean of squares
        difference_BCHW = difference_BCHW * context.weight_map.float().sqrt()
        area_B = context.weight_map.float().mean(dim=(1, 2, 3))
    spectrum_BCHW = torch.fft.fft2(difference_BCHW, norm="ortho")
    height, width = prediction.shape[-2:]
    rows_H1 = torch.fft.fftfreq(height, device=prediction.device)[:, None]
    columns_W = torch.fft.fftfreq(width, device=prediction.device)
    # 0 at frequency zero, 1 at the corner of the spectrum
    distance_HW = torch.sqrt((rows_H1**2 + columns_W**2) / 0.5)
    weight_HW = 1 + (gain - 1) * distance_HW
    loss_B: Tensor = (weight_HW * spectrum_BCHW.abs().square()).flatten(1).mean(1)
    return loss_B / area_B.clamp(min=1e-6)
