"""A contact sheet of a dataset: every bucket with a few of its images as they are cropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hyimg.cache.atomic import atomic_path
from hyimg.data.buckets import Size
from hyimg.data.sample import Sample
from hyimg.data.sheet import Tile, can_write, tile_sheet
from hyimg.data.view import load_view

_TILES_A_ROW = 6
_MAX_TILE = 256


def write_bucket_sheet(samples: Sequence[Sample], path: Path) -> bool:
    """Writes the sheet as a PNG; false where file names need glyphs that no installed font has.

    A row is a bucket of a dataset, with up to six images taken evenly from it. Raises `HyimgError` where an
    image cannot be read or the file cannot be written.
    """
    by_bucket: defaultdict[tuple[int, Size], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_bucket[sample.dataset_index, sample.bucket].append(sample)
    several = len({number for number, _ in by_bucket}) > 1
    rows = [
        (_row_label(number, bucket, own, several), [_tile(sample) for sample in _some(own)])
        for (number, bucket), own in sorted(by_bucket.items())
    ]
    sheet = tile_sheet(rows, max_tile=_MAX_TILE)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return all(can_write(tile.label) for _, tiles in rows for tile in tiles)


def _row_label(number: int, bucket: Size, samples: Sequence[Sample], several: bool) -> str:
    where = f"dataset {number + 1}, " if several else ""
    upscaled = sum(sample.is_upscaled for sample in samples)
    tail = f", {upscaled} upscaled" if upscaled else ""
    return f"{where}{bucket[0]}x{bucket[1]}: {len(samples)} image{'s' * (len(samples) > 1)}{tail}"


def _some(samples: Sequence[Sample]) -> list[Sample]:
    count = min(len(samples), _TILES_A_ROW)
    return [samples[number * len(samples) // count] for number in range(count)]


def _tile(sample: Sample) -> Tile:
    image = Image.fromarray(load_view(sample).rgb_HWC)
    factor = sample.placement.resized[0] / sample.image_size[0]
    label = f"{sample.image_path.name} (x{factor:.1f})" if sample.is_upscaled else sample.image_path.name
    return Tile(image, label)
