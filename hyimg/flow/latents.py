"""Latents on disk, with what they were made with: `--output_type latent` leaves them, `--latent_path` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hyimg.cache.atomic import atomic_write_bytes
from hyimg.config.picture import METADATA_KEY, parse_settings
from hyimg.errors import HyimgError
from hyimg.flow.pictures import settings_text
from hyimg.model.architecture import VAEArch
from hyimg.model.safetensors_file import Checkpoint

LATENT_KEY = "latent"


@dataclass(frozen=True)
class Rendered:
    """A latent (batch 1, scaled, float32, CPU), and what it was made with as its files tell it (None: nothing)."""

    latent_BCHW: Tensor
    settings: Mapping[str, object] | None


def write_latent(rendered: Rendered, path: Path, *, replace: bool = True) -> None:
    """Writes a latent, whole or not at all; raises as `atomic_path`."""
    settings = rendered.settings
    metadata = None if settings is None else {METADATA_KEY: settings_text(settings)}
    data = save({LATENT_KEY: rendered.latent_BCHW.contiguous()}, metadata=metadata)
    atomic_write_bytes(path, data, replace=replace)


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
        raise HyimgError(f"the latent in `{path}` is not finite (NaN or infinity)", hint="render it anew")
    return Rendered(latent_BCHW, parse_settings(checkpoint.metadata.get(METADATA_KEY), path))
