"""`weighting_scheme` as a weight on the loss, and the word to the user where it would do nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Shapes: B batch

DRAW_SCHEMES = ("logit_normal", "mode")
"""Schemes that change which timesteps are drawn (`hyimg.flow.timesteps.sigma`)."""
LOSS_SCHEMES = ("sigma_sqrt", "cosmap")
"""Schemes that change what a loss counts."""


def loss_weighting(sigma_B: Tensor, weighting_scheme: str, prediction_type: str) -> Tensor:
    """The factor on each image's loss, shape B, float32; ones unless the prediction type is sigma_scaled.

    sigma_sqrt: 1 / sigma^2. cosmap: 2 / (pi * (1 - 2 sigma + 2 sigma^2)), arXiv 2403.03206, section 3.1.
    """
    if prediction_type != "sigma_scaled" or weighting_scheme not in LOSS_SCHEMES:
        return torch.ones_like(sigma_B, dtype=torch.float32)
    sigma_B = sigma_B.float()
    if weighting_scheme == "sigma_sqrt":
        # below a thousandth (a draw of 0 is possible) one image would drown all others, or be infinite
        return sigma_B.clamp(min=1e-3) ** -2
    return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))


def idle_weighting(weighting_scheme: str, timestep_sampling: str, prediction_type: str) -> str | None:
    """A sentence for the user where `weighting_scheme` changes nothing under the other options, else None."""
    if weighting_scheme in DRAW_SCHEMES and timestep_sampling != "sigma":
        return (
            f"`weighting_scheme` {weighting_scheme} has no effect with `timestep_sampling`"
            f" {timestep_sampling}: it chooses timesteps for `timestep_sampling` sigma only"
        )
    if weighting_scheme in LOSS_SCHEMES and prediction_type != "sigma_scaled":
        return (
            f"`weighting_scheme` {weighting_scheme} has no effect with `model_prediction_type`"
            f" {prediction_type}: it weights the loss for `model_prediction_type` sigma_scaled only"
        )
    return None
