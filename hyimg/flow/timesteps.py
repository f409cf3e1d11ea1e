"""Which noise levels training sees: raw draws by key, and the maps from a draw to a sigma.

Drawing and mapping are apart. Draws belong to a sample, so they do not change with the batch around it or
with the number of processes; a map is a pure function and agrees with tests/golden/schedule.json. A timestep
sampler, built in or a plugin's, is `(draws, context) -> sigma_B`.

Noise levels in order: the inference schedule, and the table that `--timestep_sampling sigma` draws from.

A noise level sigma runs from 0 (the image) to 1 (pure noise); the model gets sigma * 1000 as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.plugins.guard import check_tensor
from hyimg.randomness import keyed_generator

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
    """Noise levels as the model gets them: sigma * 1000, float32, never rounded to an integer."""
    return sigma_B.float() * NUM_TRAIN_TIMESTEPS


# Shapes: B batch


@dataclass(frozen=True)
class Draws:
    """The raw randomness of a batch's timesteps, float32 on the CPU; a sampler uses the one that it needs."""

    uniform_B: Tensor
    """In [0, 1)."""
    normal_B: Tensor
    """Standard normal."""


@dataclass(frozen=True, kw_only=True)
class TimestepContext:
    """What a timestep sampler may look at besides its draws: the batch's latent size, and the options."""

    latent_height: int
    latent_width: int
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float = 5.0
    weighting_scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


TimestepSampler = Callable[[Draws, TimestepContext], Tensor]


def draw(seed: int, epoch: int | str, samples: Sequence[tuple[str, int]]) -> Draws:
    """The draws of a batch; `samples` holds (sample key, repeat) for each image.

    `epoch` may be a word for draws outside of training, such as "validation".
    """
    uniform, normal = [], []
    for key, repeat in samples:
        generator = keyed_generator(seed, epoch, key, repeat, "timestep")
        uniform.append(torch.rand((), generator=generator))
        normal.append(torch.randn((), generator=generator))
    return Draws(torch.stack(uniform), torch.stack(normal))


def sample_sigmas(
    sampler: TimestepSampler,
    draws: Draws,
    context: TimestepContext,
    *,
    min_timestep: float = 0,
    max_timestep: float = 1000,
) -> Tensor:
    """Noise levels for a batch: sigma_B in min_timestep / 1000 .. max_timestep / 1000, float32.

    The sampler's distribution is scaled into the range, not cut off at its ends, so every draw is used. The
    reference tool does the same for those of its models that honour the range. Raises HyimgError for a range
    that is empty or leaves 0..1000, and for a sampler whose answer is not one noise level in 0..1 an image.
    """
    if not 0 <= min_timestep < max_timestep <= NUM_TRAIN_TIMESTEPS:
        raise HyimgError(
            f"`min_timestep` {min_timestep:g} and `max_timestep` {max_timestep:g} are no range within 0..1000"
        )
    low, high = min_timestep / NUM_TRAIN_TIMESTEPS, max_timestep / NUM_TRAIN_TIMESTEPS
    sigma_B = _checked(sampler(draws, context), sampler, batch_size=len(draws.uniform_B))
    return low + (high - low) * sigma_B


def _checked(sigma_B: object, sampler: TimestepSampler, *, batch_size: int) -> Tensor:
    """The result of a timestep sampler, which may be a plugin's, in float32; a rounding error above 1 is removed."""
    name = getattr(getattr(sampler, "func", sampler), "__name__", sampler)
    what = f"the timestep sampler `{name}` returned"
    hint = "it must return a float tensor of shape (B,) with values in 0..1"
    sigma_B = check_tensor(sigma_B, (batch_size,), what, hint=hint).float()
    # a shift may put 1 a rounding too high; the comparison is false for NaN too
    for value in sigma_B[~((sigma_B >= 0) & (sigma_B <= 1 + 1e-6))].tolist():
        raise HyimgError(f"{what} the noise level {value:g}", hint=hint)
    return sigma_B.clamp(max=1)


# ---- the maps: raw draw -> sigma


def map_sigmoid(normal_B: Tensor, *, sigmoid_scale: float = 1.0) -> Tensor:
    """Logit-normal noise levels; a larger `sigmoid_scale` spreads them towards both ends."""
    return torch.sigmoid(sigmoid_scale * normal_B)


def map_shift(normal_B: Tensor, *, sigmoid_scale: float = 1.0, discrete_flow_shift: float = 5.0) -> Tensor:
    """Logit-normal noise levels, shifted as the inference schedule is."""
    return shift_sigma(map_sigmoid(normal_B, sigmoid_scale=sigmoid_scale), discrete_flow_shift)


def map_flux_shift(
    normal_B: Tensor, *, latent_height: int, latent_width: int, sigmoid_scale: float = 1.0
) -> Tensor:
    """Logit-normal noise levels with a shift that grows with the resolution, as FLUX has it.

    The shift is exp(mu), mu a straight line through (256 tokens, 0.5) and (4096 tokens, 1.15). A token counts
    as 2x2 latent pixels because FLUX packs them so; HunyuanImage does not, but users bring their habits.
    """
    num_tokens = (latent_height // 2) * (latent_width // 2)
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    return shift_sigma(map_sigmoid(normal_B, sigmoid_scale=sigmoid_scale), math.exp(mu))


def map_sigma(density_B: Tensor, *, discrete_flow_shift: float = 5.0) -> Tensor:
    """Entries of the shifted 1000-step table; `density_B` in 0..1 says where in the table, 0 the noisiest.

    A density of exactly 1, which the `mode` scheme gives for a draw of 0, takes the last entry.
    """
    index_B = (density_B * NUM_TRAIN_TIMESTEPS).long().clamp(0, NUM_TRAIN_TIMESTEPS - 1)
    return training_sigmas(discrete_flow_shift)[index_B]


def density_logit_normal(normal_B: Tensor, *, logit_mean: float = 0.0, logit_std: float = 1.0) -> Tensor:
    """Where in the table to look, after the logit-normal density of arXiv 2403.03206, section 3.1."""
    return torch.sigmoid(logit_mean + logit_std * normal_B)


def density_mode(uniform_B: Tensor, *, mode_scale: float = 1.29) -> Tensor:
    """Where in the table to look, after the density with heavy tails of arXiv 2403.03206, section 3.1."""
    return 1 - uniform_B - mode_scale * (torch.cos(math.pi * uniform_B / 2) ** 2 - 1 + uniform_B)


# ---- the samplers that users name


def uniform(draws: Draws, context: TimestepContext) -> Tensor:
    """Every noise level alike."""
    return draws.uniform_B


def sigmoid(draws: Draws, context: TimestepContext) -> Tensor:
    """Logit-normal: mostly middle noise levels."""
    return map_sigmoid(draws.normal_B, sigmoid_scale=context.sigmoid_scale)


def shift(draws: Draws, context: TimestepContext) -> Tensor:
    """Logit-normal, moved towards high noise by `discrete_flow_shift`."""
    return map_shift(
        draws.normal_B,
        sigmoid_scale=context.sigmoid_scale,
        discrete_flow_shift=context.discrete_flow_shift,
    )


def flux_shift(draws: Draws, context: TimestepContext) -> Tensor:
    """Logit-normal, moved towards high noise the more, the larger the image."""
    return map_flux_shift(
        draws.normal_B,
        latent_height=context.latent_height,
        latent_width=context.latent_width,
        sigmoid_scale=context.sigmoid_scale,
    )


def sigma(draws: Draws, context: TimestepContext) -> Tensor:
    """The scheduler's shifted table, looked up evenly or after `weighting_scheme` logit_normal or mode."""
    if context.weighting_scheme == "logit_normal":
        density_B = density_logit_normal(
            draws.normal_B, logit_mean=context.logit_mean, logit_std=context.logit_std
        )
    elif context.weighting_scheme == "mode":
        density_B = density_mode(draws.uniform_B, mode_scale=context.mode_scale)
    else:
        density_B = draws.uniform_B
    return map_sigma(density_B, discrete_flow_shift=context.discrete_flow_shift)
