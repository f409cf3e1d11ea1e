"""The losses: `(prediction_BCHW, target_BCHW, context, **loss_args) -> loss_B`, one value an image.

Every loss computes in float32 whatever the model's precision. A plugin's loss has the same shape of call and
may end in `image_mean`, which honours the weight map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.flow.targets import per_image
from hyimg.flow.timesteps import NUM_TRAIN_TIMESTEPS

# Shapes: B batch, C latent channels, H W latent height and width


@dataclass(frozen=True)
class LossContext:
    """What a loss may know of its batch."""

    sigma_B: Tensor
    """Noise levels, 0..1, float32."""
    timestep_B: Tensor
    """sigma * 1000, float32."""
    weight_map: Tensor | None = None
    """Weights of the latent's pixels, shape B1HW, from 0 (ignored); None where all count alike."""


def image_mean(value_BCHW: Tensor, weight_map: Tensor | None) -> Tensor:
    """Mean over each image, shape B; with a weight map, over what the map lets count.

    The mean is taken over the map's area, not the image's, so that a small mask does not mean a small step
    (the reference tool divides by the whole area). A map of zeros gives 0.
    """
    if weight_map is None:
        return value_BCHW.flatten(1).mean(1)
    weight_BCHW = weight_map.to(value_BCHW.dtype).expand_as(value_BCHW)
    area_B = weight_BCHW.flatten(1).sum(1)
    return (value_BCHW * weight_BCHW).flatten(1).sum(1) / area_B.clamp(min=torch.finfo(area_B.dtype).tiny)


def weight_map_from_mask(mask_BHW: Tensor, latent_height: int, latent_width: int) -> Tensor:
    """An alpha mask (0..1, any resolution) as the weight map of a latent, shape B1HW, by area averaging."""
    return F.interpolate(mask_BHW.float().unsqueeze(1), size=(latent_height, latent_width), mode="area")


def huber_threshold(
    timestep_B: Tensor, *, huber_c: float = 0.1, huber_scale: float = 1.0, huber_schedule: str = "constant"
) -> Tensor:
    """Where a Huber loss turns from square to straight, for each image, shape B.

    constant: `huber_c * huber_scale`. exponential: `huber_scale` at timestep 0, falling to
    `huber_c * huber_scale` at 1000. Raises HyimgError for any other schedule and for a `huber_c` or
    `huber_scale` not over 0.
    """
    if not (huber_c > 0 and huber_scale > 0):
        raise HyimgError(f"`huber_c` {huber_c:g} and `huber_scale` {huber_scale:g} must both be over 0")
    if huber_schedule == "constant":
        return torch.full_like(timestep_B, huber_c * huber_scale, dtype=torch.float32)
    if huber_schedule == "exponential":
        rate = -math.log(huber_c) / NUM_TRAIN_TIMESTEPS
        return huber_scale * torch.exp(-rate * timestep_B.float())
    if huber_schedule == "snr":
        raise HyimgError(
            "`huber_schedule` snr needs the noise variances of a diffusion model, which a flow model has not",
            hint="use `--huber_schedule constant` or `exponential`",
        )
    raise HyimgError(f"unknown `huber_schedule` `{huber_schedule}`", hint="it is constant or exponential")


def _difference(prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    return prediction_BCHW.float() - target_BCHW.float()


def _pseudo_huber(difference_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """`2 * (sqrt(d^2 + c^2) - c)`, written without the subtraction, which loses the digits of a small d."""
    threshold_B111 = per_image(threshold_B, difference_BCHW)
    square = difference_BCHW.square()
    return 2 * square / (torch.sqrt(square + threshold_B111.square()) + threshold_B111)


def l1(prediction_BCHW: Tensor, target_BCHW: Tensor, context: LossContext) -> Tensor:
    """Mean absolute difference."""
    return image_mean(_difference(prediction_BCHW, target_BCHW).abs(), context.weight_map)


def l2(prediction_BCHW: Tensor, target_BCHW: Tensor, context: LossContext) -> Tensor:
    """Mean squared difference."""
    return image_mean(_difference(prediction_BCHW, target_BCHW).square(), context.weight_map)


def huber(
    prediction_BCHW: Tensor,
    target_BCHW: Tensor,
    context: LossContext,
    *,
    huber_c: float = 0.1,
    huber_scale: float = 1.0,
    huber_schedule: str = "constant",
) -> Tensor:
    """Pseudo-Huber `2c (sqrt(d^2 + c^2) - c)`: d^2 where d is small, a straight line of slope 2c beyond c."""
    threshold_B = huber_threshold(
        context.timestep_B, huber_c=huber_c, huber_scale=huber_scale, huber_schedule=huber_schedule
    )
    value_BCHW = _pseudo_huber(_difference(prediction_BCHW, target_BCHW), threshold_B)
    return image_mean(per_image(threshold_B, value_BCHW) * value_BCHW, context.weight_map)


def smooth_l1(
    prediction_BCHW: Tensor,
    target_BCHW: Tensor,
    context: LossContext,
    *,
    huber_c: float = 0.1,
    huber_scale: float = 1.0,
    huber_schedule: str = "constant",
) -> Tensor:
    """Pseudo-Huber `2 (sqrt(d^2 + c^2) - c)`: d^2 / c where d is small, a line of slope 2 beyond c.

    The reference tool's function of this name; not torch's `smooth_l1_loss`.
    """
    threshold_B = huber_threshold(
        context.timestep_B, huber_c=huber_c, huber_scale=huber_scale, huber_schedule=huber_schedule
    )
    value_BCHW = _pseudo_huber(_difference(prediction_BCHW, target_BCHW), threshold_B)
    return image_mean(value_BCHW, context.weight_map)
