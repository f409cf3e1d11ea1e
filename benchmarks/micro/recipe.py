"""What a build of the micro model is made of: everything that decides its weights, with the values that were chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one model is trained: AdamW, a warm-up and a half cosine to 0, an average of the weights."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole build."""

    seed: int = 0
    vae: Fit = Fit(steps=4500, batch_size=2, learning_rate=1e-4)
    dit: Fit = Fit(steps=15_000, batch_size=64, learning_rate=2.5e-3, warmup_steps=300)
    vae_start_pictures: int = 128
    """Pictures that the VAE's first weights are computed from."""
    num_pictures: int = 5120
    """Pictures that the DiT is trained on, encoded once."""
    caption_dropout: float = 0.1
    """Share of steps that show the DiT pictures without their captions, for guidance."""
    flow_shift: float = 5.0
    """Shift of the noise levels, which are drawn as `--timestep_sampling sigma` draws them."""
