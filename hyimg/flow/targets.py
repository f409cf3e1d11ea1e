"""What the model is shown and what it shall answer, in flow matching.

The path from image to noise is the straight line `(1 - sigma) * latent + sigma * noise`; its velocity,
`noise - latent`, is the target.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

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
