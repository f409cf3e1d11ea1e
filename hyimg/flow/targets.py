"""What the model is shown and what it shall answer, in flow matching.

The path from image to noise is the straight line `(1 - sigma) * latent + sigma * noise`; its velocity,
`noise - latent`, is the target.

Gaussian noise by key, for training and for rendering: float32, drawn on the CPU whatever the device.

`weighting_scheme` as a weight on the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hyimg.randomness import keyed_generator

# Shapes: B batch, C latent channels, H W latent height and width

PredictionType = Literal["raw", "additive", "sigma_scaled"]


def per_image(value_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """Values of a batch, shaped to multiply images: B -> B111."""
    return value_B.view(-1, *[1] * (like_BCHW.ndim - 1))


def add_noise(latent_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The noisy latent at noise level sigma_B (0 the latent, 1 the noise)."""
    sigma_B111 = per_image(sigma_B, latent_BCHW)
    return (1 - sigma_B111) * latent_BCHW + sigma_B111 * noise_BCHW


def perturb_noise(noise_BCHW: Tensor, extra_BCHW: Tensor, gamma_B: Tensor) -> Tensor:
    """Input perturbation: the noise to mix in, `noise + gamma * extra`, while the target keeps `noise`.

    Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706).
    """
    return noise_BCHW + per_image(gamma_B, noise_BCHW) * extra_BCHW


def velocity_target(latent_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The velocity from image to noise, whatever `model_prediction_type` makes of the model's answer."""
    return noise_BCHW - latent_BCHW


def apply_prediction_type(
    prediction_BCHW: Tensor, noisy_latent_BCHW: Tensor, sigma_B: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What is compared with the target: the model's answer as it is, or joined with the noisy latent.

    `additive` and `sigma_scaled` are the reference tool's, compared with the same target there; HunyuanImage
    predicts the velocity, so `raw` is the one that fits it.
    """
    if prediction_type == "additive":
        return prediction_BCHW + noisy_latent_BCHW
    if prediction_type == "sigma_scaled":
        return noisy_latent_BCHW - per_image(sigma_B, noisy_latent_BCHW) * prediction_BCHW
    assert prediction_type == "raw", prediction_type
    return prediction_BCHW


# Shapes: C latent channels, H W latent height and width


def latent_noise(
    shape: Sequence[int],
    seed: int,
    epoch: int | str,
    sample_key: str,
    repeat: int,
    purpose: str = "noise",
) -> Tensor:
    """Standard normal noise for one sample's latent, shape CHW, float32 on the CPU.

    `purpose` keeps the draws of one sample apart: "noise" (what the model must find), "posterior" (the VAE's
    sample), "ip_noise" (input perturbation). `epoch` may be a word outside of training ("validation").
    """
    generator = keyed_generator(seed, epoch, sample_key, repeat, purpose)
    return torch.randn(tuple(shape), generator=generator)


def ip_noise_strength(
    gamma: float, seed: int, epoch: int | str, sample_key: str, repeat: int, *, random: bool = False
) -> float:
    """The strength of one sample's input perturbation: `gamma`, or between 0 and `gamma` if `random`.

    One draw a sample; the reference tool draws one a batch, which would depend on the batch's company.
    """
    if not random:
        return gamma
    generator = keyed_generator(seed, epoch, sample_key, repeat, "ip_noise_strength")
    return gamma * float(torch.rand((), generator=generator))


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The noise that a rendering starts from, float32 on the CPU, the same on every device.

    Rounded to bfloat16 these are the numbers that the official pipeline draws for the seed (torch makes both
    types from the same draws where their count is a multiple of 16, as 64 channels make it).
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


# Shapes: B batch

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
