"""Image files to pixels, upright and in sRGB; resizing and cropping.

    image = decode(path.read_bytes())                    # RGB uint8, upright, sRGB, and transparency
    image = image.over_white()                           # or keep `image.alpha_HW` as a loss mask
    rgb_HWC = resize_and_crop(image.rgb_HWC, resized=(1024, 1100), crop=(0, 38), bucket=(1024, 1024), filter_name=name)

Decoders raise `ValueError` with what is wrong with a file; the caller knows its name. Shapes: H W pixels, C channels.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from hyimg.config.documents import read_bounded
from hyimg.config.image_file import opened_image
from hyimg.data.buckets import Size

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".avifs", ".heic", ".heif", ".jxl",
    ".bmp", ".dib", ".gif", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
    ".qoi", ".ico", ".psd",
})  # fmt: skip
"""Endings of image files. A file that `hyimg.config.image_file` cannot open is an error that names it."""

_STRIP_ROWS = 64
_STRIP_PIXELS = 1 << 22

IMAGE_BYTES = 1_000_000_000
"""Size limit of an image file."""
PROFILE_BYTES = 16_000_000
"""Size limit of a colour profile; a larger one is not applied."""

# Pillow's image, and the RGB and alpha that are returned
_BYTES_PER_PIXEL = 8
# Further memory of decoders: coefficients of progressive JPEGs, 32-bit components, a 16-bit copy of the image
_DECODER_BYTES_PER_PIXEL = {"PNG": 0, "JPEG": 6, "MPO": 6, "JPEG2000": 16}
_OTHER_DECODER_BYTES_PER_PIXEL = 8
# Resolution levels of a JPEG 2000 that need not be decoded to find out whether it is complete
_SKIPPED_LEVELS = 5
_JPEG2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")

# EXIF 2.32, tag Orientation: how to turn the stored image upright
_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class DecodedImage:
    """`rgb_HWC` (uint8), and `alpha_HW` (uint8, 255 = opaque) if a pixel is transparent."""

    rgb_HWC: Pixels
    alpha_HW: Pixels | None

    def over_white(self) -> DecodedImage:
        """The image composited on white."""
        if self.alpha_HW is None:
            return self
        blended_HWC = np.empty_like(self.rgb_HWC)
        for top in range(0, len(blended_HWC), _STRIP_ROWS):
            rows = slice(top, top + _STRIP_ROWS)
            alpha_HW1 = self.alpha_HW[rows, :, None].astype(np.uint16)
            blended_HWC[rows] = (self.rgb_HWC[rows] * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255
        return DecodedImage(blended_HWC, None)


def probe(data: bytes) -> Size:
    """An image's (width, height) when upright, after checking that it can be decoded to its last pixel.

    JPEGs are decoded at an eighth of their size and JPEG 2000 at a thirty-second, which is fast and still detects
    truncated files. Raises `ValueError` that says why the file cannot be decoded.
    """
    try:
        return _look(data, _probe)
    except ValueError:
        if not data.startswith(_JPEG2000):
            raise
        return _look(data, functools.partial(_probe, levels=0))  # complete, but with fewer levels


def _probe(image: Image.Image, *, levels: int = _SKIPPED_LEVELS) -> Size:
    width, height = image.size
    is_reduced = image.draft("RGB", (1, 1)) is not None
    if image.format == "JPEG2000" and levels:
        # Pillow rounds the reduced size to nearest and the decoder rounds up, so make it divisible
        image._size = (-(-width >> levels) << levels, -(-height >> levels) << levels)
        image.reduce = levels  # type: ignore[method-assign, assignment]
        is_reduced = True
    image.load()
    if not is_reduced:
        width, height = image.size  # Pillow turns a TIFF upright when loading it
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def decode(data: bytes) -> DecodedImage:
    """The first frame of an image file: upright (EXIF), in sRGB (ICC profile), 8 bits.

    Raises `ValueError` that says why the file cannot be decoded.
    """
    rgb_HWC, alpha_HW, orientation = _look(data, _to_rgb)
    if (turn := _UPRIGHT.get(orientation)) is not None:
        rgb_HWC = np.ascontiguousarray(turn(rgb_HWC))
        alpha_HW = None if alpha_HW is None else np.ascontiguousarray(turn(alpha_HW))
    return DecodedImage(rgb_HWC, alpha_HW)


def decoding_bytes(path: str | os.PathLike[str]) -> int:
    """The approximate memory in bytes to read and decode an image file, from its size and header.

    Raises OSError if it does not exist.
    """
    num_bytes = os.stat(path).st_size
    try:
        with opened_image(Path(path)) as image:
            extra = _DECODER_BYTES_PER_PIXEL.get(str(image.format), _OTHER_DECODER_BYTES_PER_PIXEL)
            return num_bytes + image.width * image.height * (_BYTES_PER_PIXEL + extra)
    except ValueError:
        return num_bytes  # decoding it raises the error


def _look(source: bytes | str | os.PathLike[str], look: Callable[[Image.Image], T]) -> T:
    """`look(image)` for an image file. Raises `ValueError` that says why the file cannot be decoded."""
    try:
        with opened_image(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
            return look(image)
    except ValueError:
        data = source if isinstance(source, bytes) else read_bounded(source, IMAGE_BYTES)
        if (plain := _without_text(data)) is None:
            raise
        with contextlib.suppress(ValueError), opened_image(io.BytesIO(plain)) as image:
            image.info["icc_profile"] = _png_profile(data)
            return look(image)
        raise


_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end of content) of each chunk of a PNG; the checksum follows the content."""
    start = len(_PNG)
    while len(data) >= start + 8:
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], start, end
        start = end + 4


def _without_text(data: bytes) -> bytes | None:
    """A PNG without texts and colour profile, which Pillow refuses over a megabyte; None if it has none."""
    if not data.startswith(_PNG):
        return None
    chunks = list(_png_chunks(data))
    kept = [data[start : end + 4] for name, start, end in chunks if name not in _PNG_TEXT]
    return None if len(kept) == len(chunks) else b"".join((_PNG, *kept))


def _png_profile(data: bytes) -> bytes | None:
    """The colour profile of a PNG; if it is too large or damaged, one that `_is_usable` refuses."""
    for name, start, end in _png_chunks(data):
        if name == b"iCCP":
            compressed = data[start + 8 : end].partition(b"\0")[2][1:]
            try:
                return zlib.decompressobj().decompress(compressed, PROFILE_BYTES + 1)
            except zlib.error:
                return b"\0"
    return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1  # broken metadata does not make the image unreadable


def _to_rgb(image: Image.Image) -> tuple[Pixels, Pixels | None, int]:
    """`rgb_HWC` and `alpha_HW` of an image as stored (uint8), and its EXIF orientation.

    Converted in strips, so that only Pillow's image and the result have the full size.
    """
    image.load()
    alpha_HW, profile, full = _alpha(image), image.info.get("icc_profile"), _full_value(image)
    rgb_HWC = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        colors = _eight_bits(strip, full)
        if alpha_HW is not None:
            colors = colors.convert("RGBA").convert("RGB") if colors.mode != "LA" else colors.convert("L")
        elif colors.mode == "P":
            colors = colors.convert("RGB")
        if profile:
            colors = _to_srgb(colors, profile)
        rgb_HWC[top : top + strip.height] = np.asarray(colors.convert("RGB"))
    return rgb_HWC, alpha_HW, _orientation(image)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, rows) of an image from top to bottom."""
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _alpha(image: Image.Image) -> Pixels | None:
    """The transparency of an image, uint8 [H, W], or None if every pixel is opaque."""
    # the transparency key of a 16-bit grey file is one grey value, which Pillow cannot apply
    if not image.has_transparency_data or image.mode.startswith("I"):
        return None
    alpha_HW: Pixels | None = None
    for top, strip in _strips(image):
        alpha: Pixels = np.asarray(strip.convert("RGBA").getchannel("A"))
        if alpha_HW is None and bool((alpha < 255).any()):
            alpha_HW = np.full((image.height, image.width), 255, np.uint8)
        if alpha_HW is not None:
            alpha_HW[top : top + strip.height] = alpha
    return alpha_HW


def _full_value(image: Image.Image) -> float | None:
    """The value of white in a grey image of 16 or 32 bits or of floats; None for other images."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return None
    most = float(np.max([np.asarray(strip).max(initial=0) for _, strip in _strips(image)]))
    if image.mode == "F":
        return 1.0 if most <= 1.0 else 255.0
    return 65535.0 if most <= 65535 else most


def _eight_bits(image: Image.Image, full: float | None) -> Image.Image:
    """A grey image of 16 or 32 bits or of floats scaled to 8 bits; `convert` would clip it at 255."""
    if full is None:
        return image
    values: npt.NDArray[Any] = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in sRGB; unchanged if the profile is broken, too large or for another kind of image."""
    if len(profile) > PROFILE_BYTES:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None
    return converted


# Formats whose further frames are previews, depth maps or layers
_ONE_PICTURE_FORMATS = ("MPO", "PSD")
# Difference of 255 between a mask's channels: what JPEG compression does to grey
_GREY_TOLERANCE = 16
# Mode of an image -> its mode when the colour profile is applied
_MODES_OF_COLORS = {"RGBA": "RGB", "P": "RGB", "PA": "RGB", "LA": "L", "F": "L"}


def traits_of(path: Path, *, is_mask: bool = False) -> frozenset[str]:
    """The parts of an image file that are ignored or converted.

    "frames" (more than one), "transparent" (somewhere), "profile" (a colour profile that cannot be applied), "cmyk"
    (without a profile); for masks also "colors" (only the red channel is used). Reads only the header of most files.
    Raises `ValueError` that says why the file cannot be decoded.
    """
    return _look(path, functools.partial(_traits, is_mask=is_mask))


def _traits(image: Image.Image, *, is_mask: bool) -> frozenset[str]:
    found: set[str] = set()
    if image.format not in _ONE_PICTURE_FORMATS and getattr(image, "is_animated", False):
        found.add("frames")
    profile = image.info.get("icc_profile")
    mode = "L" if image.mode.startswith("I") else _MODES_OF_COLORS.get(image.mode, image.mode)
    if profile and not _is_usable(profile, mode):
        found.add("profile")
    elif not profile and image.mode == "CMYK":
        found.add("cmyk")
    if _alpha(image) is not None:
        found.add("transparent")
    if is_mask and mode != "L" and any(map(_has_colors, (strip for _, strip in _strips(image)))):
        found.add("colors")
    return frozenset(found)


def _has_colors(image: Image.Image) -> bool:
    rgb_HWC = np.asarray(image.convert("RGB"))
    return int((rgb_HWC.max(axis=2) - rgb_HWC.min(axis=2)).max(initial=0)) > _GREY_TOLERANCE


@functools.lru_cache(maxsize=8)
def _is_usable(profile: bytes, mode: str) -> bool:
    """Whether a colour profile can be applied to images of a mode; the images of a dataset share a few profiles."""
    dot = Image.new(mode, (1, 1))
    return _to_srgb(dot, profile) is not dot


_PILLOW_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
_RESIZED_ROWS = 64


def resize_and_crop(
    pixels: Pixels, *, resized: Size, crop: tuple[int, int], bucket: Size, filter_name: str
) -> Pixels:
    """Pixels, uint8 [H, W] or [H, W, C], resized to `resized` (width, height) and cropped to `bucket` at `crop`.

    `crop` is (left, top) in resized pixels; `filter_name` is a value of `RESIZE_FILTERS`.
    """
    if pixels.shape[1::-1] != resized:
        if filter_name == "area":
            pixels = area_average(pixels, resized)
        else:
            pixels = np.asarray(Image.fromarray(pixels).resize(resized, _PILLOW_FILTERS[filter_name]))
    left, top = crop
    return pixels[top : top + bucket[1], left : left + bucket[0]]


def area_average(pixels: Pixels, size: Size) -> Pixels:
    """Pixels, uint8 [H, W] or [H, W, C], at `size` (width, height): the mean over the area of each new pixel.

    A source pixel is weighted by the part of it that is covered, as in OpenCV's INTER_AREA; Pillow's BOX weights whole
    pixels only. The mean is exact and rounded half to even, so the result is the same on every processor.
    """
    height, width = pixels.shape[:2]
    rows, row_overlaps = _overlaps(height, size[1])
    columns, column_overlaps = _overlaps(width, size[0])
    area = float(row_overlaps[0].sum()) * float(column_overlaps[0].sum())
    out = np.empty((size[1], size[0], *pixels.shape[2:]), np.uint8)
    extra = (1,) * (pixels.ndim - 2)
    for start in range(0, size[1], _RESIZED_ROWS):
        strip = slice(start, start + _RESIZED_ROWS)
        # integers of at most 255 * H and then 255 * H * W, so neither dtype rounds
        summed = np.zeros((len(rows[strip]), *pixels.shape[1:]), np.uint32)
        for index, overlap in zip(rows[strip].T, row_overlaps[strip].T, strict=True):
            summed += pixels[index] * overlap.astype(np.uint32).reshape(-1, 1, *extra)
        total = np.zeros((len(summed), *out.shape[1:]), np.float64)
        for index, overlap in zip(columns.T, column_overlaps.T, strict=True):
            total += summed[:, index] * overlap.astype(np.float64).reshape(1, -1, *extra)
        out[strip] = np.rint(total / area)
    return out


def _overlaps(length: int, new_length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(indices of the old pixels under each new pixel along an axis, their overlaps), both int64 [new, most].

    Overlaps are integers: an old pixel is `new_length` long and a new one `length`, both divided by their greatest
    common divisor. Padding has the overlap 0.
    """
    divisor = math.gcd(length, new_length)
    old, new = new_length // divisor, length // divisor
    left = np.arange(new_length)[:, None] * new
    index = left // old + np.arange(-(-new // old) + 1)
    overlap = np.minimum((index + 1) * old, left + new) - np.maximum(index * old, left)
    return np.minimum(index, length - 1), np.maximum(overlap, 0)


def filter_for(image: Size, resized: Size, chosen: str | None) -> str:
    """The chosen filter's name, else "area" for shrinking and "lanczos" for enlarging either side."""
    if chosen is not None:
        return chosen
    return "area" if image[0] >= resized[0] and image[1] >= resized[1] else "lanczos"
