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
    vae: Fit = Fit(steps=8000, batch_size=2, learning_rate=5e-4)
    dit: Fit = Fit(steps=8000, batch_size=64, learning_rate=5e-4)
    vae_stages: tuple[tuple[float, int], ...] = ((0.3, 32), (0.5, 64), (0.2, 128))
    """Shares of the VAE's steps, and the side of the parts of pictures that it is trained on in each.

    A step has the pixels of `vae.batch_size` whole pictures whatever the side: small parts are many, of as many
    pictures, and colours are learnt from many.
    """
    num_pictures: int = 8192
    """Pictures that the DiT is trained on, encoded once."""
    caption_dropout: float = 0.1
    """Share of samples that the DiT is shown without their caption, for guidance."""
    flow_shift: float = 5.0
    """Shift of the noise levels, which are drawn as `--timestep_sampling sigma` draws them."""
