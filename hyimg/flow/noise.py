"""Gaussian noise by key, for training and for rendering: float32, drawn on the CPU whatever the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyimg.randomness import keyed_generator

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
