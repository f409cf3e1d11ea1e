"""Which image sizes can be rendered: the VAE turns 32x32 pixels into one latent pixel."""

from __future__ import annotations

from hyimg.errors import HyimgError
from hyimg.model.architecture import SPATIAL_FACTOR

SIZE_MULTIPLE = SPATIAL_FACTOR


def is_valid_size(pixels: int) -> bool:
    """Whether an image may be so wide or high."""
    return pixels >= SIZE_MULTIPLE and pixels % SIZE_MULTIPLE == 0


def nearest_sizes(pixels: int) -> tuple[int, ...]:
    """The valid widths or heights just under and over `pixels`, one where there is only one."""
    below = pixels // SIZE_MULTIPLE * SIZE_MULTIPLE
    if is_valid_size(pixels):
        return (pixels,)
    return (SIZE_MULTIPLE,) if below < SIZE_MULTIPLE else (below, below + SIZE_MULTIPLE)


def size_hint(pixels: int) -> str:
    """The way out for a size that is not valid."""
    near = nearest_sizes(pixels)
    if len(near) == 1:
        return f"the nearest valid size is {near[0]}"
    return f"the nearest valid sizes are {near[0]} and {near[1]}"


def check_size(pixels: int, name: str) -> None:
    """Raise HyimgError, naming `name`, where an image cannot be `pixels` wide or high."""
    if not is_valid_size(pixels):
        raise HyimgError(f"`{name}` {pixels} is not a multiple of {SIZE_MULTIPLE}", hint=size_hint(pixels))
