"""Latents to pictures: decoding, and PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from hyimg.cache.atomic import atomic_path
from hyimg.config.picture import METADATA_KEY
from hyimg.errors import RunError
from hyimg.model.vae import VAE


def settings_text(settings: Mapping[str, object]) -> str:
    """Settings as pictures and latent files hold them: JSON."""
    return json.dumps(settings, ensure_ascii=False, default=str)


@torch.no_grad()
def decode_image(vae: VAE, latent_BCHW: Tensor) -> Image.Image:
    """The picture of a scaled latent of batch 1; values outside of -1..1 are clipped here and nowhere before.

    Raises RunError for a picture with NaN or infinity, which would be saved as if it were black.
    """
    weight = next(vae.parameters())
    image_CHW = vae.decode(latent_BCHW.to(weight.device, weight.dtype))[0].float().cpu()
    if not torch.isfinite(image_CHW).all():
        raise RunError(
            f"the decoded image is not finite (NaN or infinity); the VAE computed in {weight.dtype}",
            hint="give `--mixed_precision no`, or lower `--lora_multiplier` or `--guidance_scale`",
        )
    levels_HWC = ((image_CHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(levels_HWC.numpy()))


def save_png(
    image: Image.Image, path: Path, settings: Mapping[str, object] | None, *, replace: bool = True
) -> None:
    """Writes a PNG, whole or not at all, with its settings in the text chunk `hyimg` (None: without).

    Raises as `atomic_path`.
    """
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(METADATA_KEY, settings_text(settings))
    with atomic_path(path, replace=replace) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
