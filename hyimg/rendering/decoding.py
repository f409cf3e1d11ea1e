"""Latents to pictures: decoding, and PNG files that say how they were made.

Latents on disk, with what they were made with: `--output_type latent` leaves them, `--latent_path` reads them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save
from torch import Tensor

from hyimg.cache.atomic import atomic_write_bytes
from hyimg.checkpoints.architecture import VAEArch
from hyimg.checkpoints.safetensors_file import Checkpoint, read_header
from hyimg.config.image_file import METADATA_KEY, parse_settings
from hyimg.errors import HyimgError, RunError
from hyimg.model.vae import VAE


def settings_text(settings: Mapping[str, object]) -> str:
    """Settings as pictures and latent files hold them: JSON."""
    return json.dumps(settings, ensure_ascii=False, default=str)


def as_recorded(settings: Mapping[str, object]) -> dict[str, Any]:
    """The settings as they are read back from a file, where tuples are lists and paths texts."""
    recorded: dict[str, Any] = json.loads(settings_text(settings))
    return recorded


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


def png_bytes(image: Image.Image, settings: Mapping[str, object] | None) -> bytes:
    """A picture as the content of a PNG, with its settings in the text chunk `hyimg` (None: without)."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(METADATA_KEY, settings_text(settings))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(
    image: Image.Image, path: Path, settings: Mapping[str, object] | None, *, root: Path | None = None
) -> None:
    """Writes a PNG with its settings, whole or not at all; `root` and errors as for `atomic_path`."""
    atomic_write_bytes(path, png_bytes(image, settings), root=root)


LATENT_KEY = "latent"


@dataclass(frozen=True)
class Rendered:
    """A latent (batch 1, scaled, float32, CPU), and what it was made with as its files tell it (None: nothing)."""

    latent_BCHW: Tensor
    settings: Mapping[str, object] | None


def latent_bytes(rendered: Rendered) -> bytes:
    """A latent as the content of its file; the same for the same latent."""
    settings = rendered.settings
    metadata = None if settings is None else {METADATA_KEY: settings_text(settings)}
    return save({LATENT_KEY: rendered.latent_BCHW.contiguous()}, metadata=metadata)


def write_latent(rendered: Rendered, path: Path, *, root: Path | None = None) -> None:
    """Writes a latent, whole or not at all; `root` and errors as for `atomic_path`."""
    atomic_write_bytes(path, latent_bytes(rendered), root=root, verify=read_header)


def read_latent(path: Path, vae: VAEArch) -> Rendered:
    """A saved latent; raises HyimgError for a file without one, or with one that the VAE cannot decode."""
    checkpoint = Checkpoint.open(path, mmap=False)  # the file may be removed while the latent is in use
    info = checkpoint.tensors.get(LATENT_KEY)
    if info is None or len(info.shape) != 4 or info.shape[0] != 1 or 0 in info.shape:
        raise HyimgError(
            f"`{path}` holds no latent", hint="`hyimg infer --output_type latent` writes such files"
        )
    if info.shape[1] != vae.latent_channels:
        raise HyimgError(
            f"the latent in `{path}` has {info.shape[1]} channels, and the VAE's have {vae.latent_channels}",
            hint="give the `--vae` of the model that it was rendered with",
        )
    latent_BCHW = checkpoint.read(LATENT_KEY).float()
    if not torch.isfinite(latent_BCHW).all():
        raise HyimgError(f"the latent in `{path}` is not finite (NaN or infinity)", hint="render it again")
    return Rendered(latent_BCHW, parse_settings(checkpoint.metadata.get(METADATA_KEY), path))
