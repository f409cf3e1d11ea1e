"""A view of a sample: its image as it is trained, resized, cut and perhaps mirrored, with its loss mask. No torch.

The VAE and the report's contact sheet both look at samples through here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hyimg.cache.identity import hash_bytes
from hyimg.cache.latents import LatentRecipe
from hyimg.data.images import DecodedImage, Pixels, decode, resize_and_crop
from hyimg.data.sample import Sample
from hyimg.errors import HyimgError


@dataclass(frozen=True)
class View:
    """`rgb_HWC` (uint8, of the bucket's size) and, where the subset has masks, `mask_HW` (uint8, 255 = counts)."""

    rgb_HWC: Pixels
    mask_HW: Pixels | None


def load_view(sample: Sample, *, flipped: bool = False) -> View:
    """The view of a sample, from its files.

    Raises `HyimgError` where an image cannot be read, or is no longer what was scanned.
    """
    pixels = _decode_scanned(sample.image_path, sample.image_hash)
    mask_HW = None
    if sample.subset.alpha_mask:
        # an image without transparency counts whole, as in the reference tool
        opaque_HW = np.full(pixels.rgb_HWC.shape[:2], 255, np.uint8)
        mask_HW = opaque_HW if pixels.alpha_HW is None else pixels.alpha_HW
    else:
        pixels = pixels.over_white()
    if sample.mask_path is not None:
        assert sample.mask_hash is not None
        mask = _decode_scanned(sample.mask_path, sample.mask_hash)
        mask_HW = mask.over_white().rgb_HWC[:, :, 0]  # the red channel, as in the reference tool
    recipe = sample.recipe(flipped)
    return View(_place(pixels.rgb_HWC, recipe), None if mask_HW is None else _place(mask_HW, recipe))


def _decode_scanned(path: Path, sha256: str) -> DecodedImage:
    try:
        data = path.read_bytes()
        if hash_bytes(data) != sha256:
            raise HyimgError(
                f"the image `{path}` was changed while the command ran", hint="run the command again"
            )
        return decode(data)
    except OSError as error:
        raise HyimgError(f"cannot read the image `{path}`: {error.strerror}") from error
    except ValueError as error:
        raise HyimgError(f"cannot read the image `{path}`: {error}") from error


def _place(pixels: Pixels, recipe: LatentRecipe) -> Pixels:
    placed = resize_and_crop(
        pixels, resized=recipe.resized, crop=recipe.crop, bucket=recipe.bucket, filter_name=recipe.filter
    )
    # a copy: what Pillow hands out is read-only, which torch does not take
    return np.array(placed[:, ::-1] if recipe.flipped else placed)
