"""Noise levels in order: the inference schedule, and the table that `--timestep_sampling sigma` draws from.

A noise level sigma runs from 0 (the image) to 1 (pure noise); the model is told sigma * 1000 as float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyimg.errors import HyimgError

# Shapes: B batch

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1 (`shift` > 1) or 0 (`shift` < 1); 0 and 1 stay where they are.

    `shift * s / (1 + (shift - 1) * s)`: Esser et al., "Scaling Rectified Flow Transformers for
    High-Resolution Image Synthesis" (arXiv 2403.03206), section 5.3.2.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def inference_sigmas(steps: int, shift: float = 5.0) -> Tensor:
    """The `steps + 1` noise levels of a rendering, float32 on the CPU, falling from exactly 1 to exactly 0.

    Raises HyimgError where `steps` is not at least 1 or `shift` is not positive.
    """
    if steps < 1:
        raise HyimgError(f"the number of steps must be at least 1, not {steps}")
    if not shift > 0:
        raise HyimgError(f"the flow shift must be over 0, not {shift:g}", hint="5 suits HunyuanImage-2.1")
    return shift_sigma(torch.linspace(1, 0, steps + 1), shift)


def training_sigmas(shift: float = 5.0) -> Tensor:
    """The 1000 noise levels that `--timestep_sampling sigma` chooses from, float32, falling from 1.

    float32 throughout: the same table in bfloat16 has 294 distinct values.
    """
    t = torch.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=torch.float32) / NUM_TRAIN_TIMESTEPS
    return shift_sigma(t, shift)


def timesteps(sigma_B: Tensor) -> Tensor:
    """What the model is told about noise levels: sigma * 1000, float32, never rounded to an integer."""
    return sigma_B.float() * NUM_TRAIN_TIMESTEPS
