"""Image files to pixels: whatever Pillow opens, as a person would see it, resized and cut.

    pixels = decode(path.read_bytes())                   # RGB uint8, upright, sRGB, and transparency
    pixels = pixels.over_white()                         # or keep `pixels.alpha_HW` as a loss mask
    rgb_HWC = resize_and_crop(pixels.rgb_HWC, resized=(1024, 1100), crop=(0, 38), bucket=(1024, 1024), ...)

Functions here raise `ValueError` with the reason a file is bad; the caller knows its name.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from hyimg.data.buckets import Size

Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".avifs", ".heic", ".heif", ".jxl",
    ".bmp", ".dib", ".gif", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
    ".qoi", ".ico", ".psd",
})  # fmt: skip
"""Files that are taken for images. One that this installation's Pillow cannot open is an error by name."""

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,  # each pixel counts by its area, up to whole pixels
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}

# EXIF 2.32, tag Orientation: what turns the stored picture upright
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

# what Pillow raises for files that are broken, unknown, or too large to be a picture
_BAD_IMAGE = (
    *(OSError, ValueError, SyntaxError, TypeError, EOFError, MemoryError),
    Image.DecompressionBombError,
)
# large sizes and odd metadata: what matters of it becomes an error. Once for the process, since setting
# filters around each image is not safe with threads
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class DecodedImage:
    """`rgb_HWC` (uint8) and, where the file has transparency, `alpha_HW` (uint8, 255 = opaque)."""

    rgb_HWC: Pixels
    alpha_HW: Pixels | None

    def over_white(self) -> DecodedImage:
        """The image composited on white."""
        if self.alpha_HW is None:
            return self
        alpha_HW1 = self.alpha_HW[..., None].astype(np.uint16)
        blended = (self.rgb_HWC * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255
        return DecodedImage(blended.astype(np.uint8), None)


def probe(data: bytes) -> Size:
    """An image's (width, height) as seen, once it is sure that it can be decoded to its last pixel.

    JPEGs are decoded at an eighth of their size, which is fast and sees a truncated file as well. Raises
    `ValueError` that says why the file cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            sideways = _orientation(image) in _SIDEWAYS
            image.draft("RGB", (1, 1))
            image.load()
    except _BAD_IMAGE as error:
        raise ValueError(_reason(error)) from error
    return (height, width) if sideways else (width, height)


def decode(data: bytes) -> DecodedImage:
    """The first frame of an image file: upright (EXIF), in sRGB (ICC profile), 8 bits.

    Raises `ValueError` that says why the file cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            profile = image.info.get("icc_profile")
            turn = _UPRIGHT.get(_orientation(image))
            return _to_rgb(image if turn is None else image.transpose(turn), profile)
    except _BAD_IMAGE as error:
        raise ValueError(_reason(error)) from error


def resize_and_crop(
    pixels: Pixels, *, resized: Size, crop: tuple[int, int], bucket: Size, filter_name: str
) -> Pixels:
    """Pixels [H, W] or [H, W, C] resized to `resized` (width, height) and cut to `bucket` at `crop`."""
    image = Image.fromarray(pixels)
    if image.size != resized:
        image = image.resize(resized, _FILTERS[filter_name])
    left, top = crop
    return np.asarray(image)[top : top + bucket[1], left : left + bucket[0]]


def filter_for(image: Size, resized: Size, chosen: str | None) -> str:
    """The filter's name: the chosen one, else area when shrinking and lanczos when enlarging either side."""
    if chosen is not None:
        return chosen
    return "area" if image[0] >= resized[0] and image[1] >= resized[1] else "lanczos"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (*_BAD_IMAGE, struct.error, KeyError):
        return 1  # broken metadata do not make a bad picture


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({error})"
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image, profile: bytes | None) -> DecodedImage:
    alpha_HW = _alpha(image)
    image = _eight_bits(image)
    if alpha_HW is not None:
        image = image.convert("RGBA").convert("RGB") if image.mode != "LA" else image.convert("L")
    elif image.mode == "P":
        image = image.convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    return DecodedImage(np.array(image.convert("RGB"), dtype=np.uint8), alpha_HW)


def _alpha(image: Image.Image) -> Pixels | None:
    """The transparency of an image, or None where every pixel is opaque."""
    # transparency keys of 16-bit grey files name one grey value, which Pillow cannot apply
    if not image.has_transparency_data or image.mode.startswith("I"):
        return None
    alpha = np.array(image.convert("RGBA").getchannel("A"), dtype=np.uint8)
    return None if bool((alpha == 255).all()) else alpha


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 and 32 bits and of floats, in 8 bits; `convert` would cut them off at 255."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values: npt.NDArray[Any] = np.array(image).astype(np.float64)
    if image.mode == "F":
        full = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    else:
        full = 65535.0 if values.max(initial=0.0) <= 65535 else float(values.max())
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in sRGB; as it is where the profile is broken or made for another kind of image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None
    return converted
