"""The size at which an image is trained: aspect-ratio buckets, resizing and cropping.

    sizes = BucketSizes(resolution=(1024, 1024), min_reso=256, max_reso=2048, steps=32, no_upscale=False)
    placement = sizes.place((3000, 2000))       # Placement(bucket=(1248, 832), resized=..., crop=...)

Agrees with the reference tool (tests/golden/buckets.json), except that an image smaller than one step is enlarged to
one step. All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SIZE_MULTIPLE = 32
"""The VAE turns 32x32 pixels into one latent pixel, so every bucket is a multiple of it."""

Size = tuple[int, int]

CROP_LIMIT = 0.2
"""The share of an image that a crop may remove before the image is listed.

Rounding to a bucket removes at most 15% at a resolution of 256 and 8% from 512 on (32-pixel steps, aspect ratios within
the buckets'), so a larger share has a cause that the user can remove: no buckets (a 4:3 photo cropped to a square loses
25%), or an aspect ratio beyond the buckets.
"""


@dataclass(frozen=True)
class Placement:
    """How an image gets its bucket's size: resized to `resized`, then cropped to `bucket` at `crop` (left, top)."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]

    def aspect_error(self, image: Size) -> float:
        """The bucket's width / height minus the image's: 0 if nothing is cropped."""
        return self.bucket[0] / self.bucket[1] - image[0] / image[1]

    @property
    def cropped_share(self) -> float:
        """The share of the image that the crop removes, 0..1."""
        (width, height), (resized_width, resized_height) = self.bucket, self.resized
        return 1 - width * height / (resized_width * resized_height)

    def enlarges(self, image: Size) -> bool:
        return self.resized[0] > image[0] or self.resized[1] > image[1]


def bucket_sizes(resolution: Size, min_reso: int, max_reso: int, steps: int) -> list[Size]:
    """Every bucket of at most the resolution's area, with sides of `min_reso`..`max_reso`, sorted."""
    max_area = resolution[0] * resolution[1]
    square = int(math.sqrt(max_area) // steps) * steps
    sizes = {(square, square)}
    for width in range(min_reso, max_reso + 1, steps):
        height = min(max_reso, max_area // width // steps * steps)
        if height >= min_reso:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


@dataclass(frozen=True)
class BucketSizes:
    """The buckets of one dataset.

    `steps` None means no buckets: every image is cropped to `resolution`. `min_reso` and `max_reso` bound the
    sides, and are rounded outwards to multiples of `steps`. With `no_upscale` the buckets follow from the images,
    which are never enlarged, and the bounds are not used.
    """

    resolution: Size
    steps: int | None = None
    min_reso: int = 256
    max_reso: int = 1024
    no_upscale: bool = False
    predefined: tuple[Size, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "predefined", tuple(self._predefined()))

    def _predefined(self) -> list[Size]:
        if self.steps is None:
            return [self.resolution]
        if self.no_upscale:
            return []
        min_reso, max_reso = self.bounds
        return bucket_sizes(self.resolution, min_reso, max_reso, self.steps)

    @property
    def bounds(self) -> tuple[int, int]:
        """`min_reso` and `max_reso` as multiples of `steps`."""
        steps = self.steps or 1
        return self.min_reso // steps * steps, -(-self.max_reso // steps) * steps

    def place(self, image: Size) -> Placement:
        """The bucket, resize and centre crop for an image's size."""
        if self.steps is not None and self.no_upscale:
            bucket, resized = self._shrunk(image, self.steps)
        else:
            bucket = self._nearest(image)
            resized = _covering(image, bucket)
        crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
        return Placement(bucket, resized, crop)

    def _nearest(self, image: Size) -> Size:
        """The predefined bucket of the image's size, else the first with the nearest aspect ratio."""
        if image in self.predefined:
            return image
        aspect = image[0] / image[1]
        return min(self.predefined, key=lambda size: abs(size[0] / size[1] - aspect))

    def _shrunk(self, image: Size, steps: int) -> tuple[Size, Size]:
        """(bucket, resized size) for `no_upscale`: the image or smaller, cropped to whole steps."""
        max_area = self.resolution[0] * self.resolution[1]
        resized = image if image[0] * image[1] <= max_area else _fitted(image, max_area, steps)
        if min(resized) < steps:
            # the only enlargement: the short side to one step, since a bucket cannot be empty
            scale = steps / min(resized)
            resized = (max(steps, round(resized[0] * scale)), max(steps, round(resized[1] * scale)))
        longest = max(steps, max_area // steps // steps * steps)
        width, height = (min(side // steps * steps, longest) for side in resized)
        return (width, height), resized


def _covering(image: Size, bucket: Size) -> Size:
    """The image's size when it just covers the bucket."""
    if image[0] / image[1] > bucket[0] / bucket[1]:
        scale = bucket[1] / image[1]
    else:
        scale = bucket[0] / image[0]
    return int(image[0] * scale + 0.5), int(image[1] * scale + 0.5)


def _fitted(image: Size, max_area: int, steps: int) -> Size:
    """The size of about `max_area` with the image's aspect ratio and one side a multiple of `steps`: the side that
    brings the bucket's aspect ratio nearer."""
    aspect = image[0] / image[1]
    ideal_width = math.sqrt(max_area * aspect)
    width = _rounded(ideal_width, steps)
    height_for_width = _rounded(width / aspect, steps)
    height = _rounded(max_area / ideal_width, steps)
    width_for_height = _rounded(height * aspect, steps)
    if abs(width / height_for_width - aspect) < abs(width_for_height / height - aspect):
        return width, int(width / aspect + 0.5)
    return int(height * aspect + 0.5), height


def _rounded(side: float, steps: int) -> int:
    """Rounded to pixels, then down to a multiple of `steps`; at least one step."""
    pixels = int(side + 0.5)
    return max(steps, pixels - pixels % steps)
