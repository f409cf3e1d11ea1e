"""Random weights for tiny models and tests: every tensor a function of (seed, name), whatever the order."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hyimg.model.vae import VAE
from hyimg.randomness import keyed_generator

# A random encoder would give deviations near 1, for sharp images in the thousands; a trained one's are small
_LOG_VARIANCE_BIAS = -20.0


def init_random(model: nn.Module, seed: int) -> None:
    """Fills a DiT or VAE, in place and on any device but meta, with weights of sensible scale.

    Every product keeps its input's order of magnitude, norms scale by about 1, and biases and modulation are
    not zero: outputs are of unit order and gradients reach every Linear.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=keyed_generator(seed, name, "init"))
            parameter.copy_(_scaled(name, values))
        if isinstance(model, VAE):
            bias = model.encoder.conv_out.bias
            assert bias is not None
            bias[model.arch.latent_channels :] += _LOG_VARIANCE_BIAS


def _scaled(name: str, values: Tensor) -> Tensor:
    if values.ndim >= 2:
        return values / math.sqrt(values[0].numel())
    return 1 + 0.1 * values if "norm" in name and name.endswith(".weight") else 0.1 * values
