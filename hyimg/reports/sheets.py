"""Contact sheets: many small labelled images on one large one; of renders, and of a dataset's buckets."""

from __future__ import annotations

import bisect
import functools
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hyimg.cache.atomic import atomic_path
from hyimg.data.buckets import CROP_LIMIT, Size
from hyimg.data.pixels import load_pixels
from hyimg.data.samples import Sample

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_LABEL_SIZE = 16
_PADDING = 8
_LINE = _LABEL_SIZE + _PADDING
MAX_TILE = 512
# Fonts with Chinese, Japanese and Korean glyphs, as Linux, Windows and macOS name their files
_CJK_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf"),
    *("SourceHanSansSC-Regular.otf", "SourceHanSansCN-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
    *("DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "uming.ttc", "NanumGothic.ttf"),
    *("msyh.ttc", "simsun.ttc", "YuGothM.ttc", "malgun.ttf"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf"),
)


@dataclass(frozen=True)
class SheetTile:
    """An image and the line of text above it."""

    image: Image.Image
    label: str


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """One image of many: `rows` of images under column labels, each row under its own label.

    Images are scaled down to 512 pixels on their longer side.
    """
    tiles = [[_scaled(image, MAX_TILE) for image in row] for row in rows]
    widths = [max(row[i].width for row in tiles) for i in range(len(column_labels))]
    heights = [max(tile.height for tile in row) for row in tiles]
    width = sum(widths) + _PADDING * (len(widths) + 1)
    longest_label = max(label_font(label).getlength(_one_line(label)) for label in row_labels)
    # leave room for the prompts of small images
    width = max(width, min(math.ceil(longest_label) + 2 * _PADDING, MAX_TILE + 2 * _PADDING))
    sheet, draw = _blank(width, _LINE + sum(heights) + (_LINE + _PADDING) * len(rows) + _PADDING)
    x = _PADDING
    for label, column_width in zip(column_labels, widths, strict=True):
        # the names of a run's checkpoints differ at the end
        _label(draw, (x, _PADDING // 2), label, column_width, keep_end=True)
        x += column_width + _PADDING
    y = _LINE
    for label, height, row in zip(row_labels, heights, tiles, strict=True):
        _label(draw, (_PADDING, y + _PADDING // 2), label, width - 2 * _PADDING)
        x, y = _PADDING, y + _LINE
        for tile, column_width in zip(row, widths, strict=True):
            sheet.paste(tile, (x, y))
            x += column_width + _PADDING
        y += height + _PADDING
    return sheet


def tile_sheet(rows: Sequence[tuple[str, Sequence[SheetTile]]], *, max_tile: int) -> Image.Image:
    """One image of labelled rows of labelled tiles; rows may differ in length.

    Images are scaled down to `max_tile` pixels on their longer side.
    """
    scaled = [
        (label, [SheetTile(_scaled(tile.image, max_tile), tile.label) for tile in tiles])
        for label, tiles in rows
    ]
    width = max(_PADDING + (_PADDING + max_tile) * len(tiles) for _, tiles in scaled)
    heights = [2 * _LINE + max(tile.image.height for tile in tiles) + _PADDING for _, tiles in scaled]
    sheet, draw = _blank(width, sum(heights) + _PADDING)
    y = 0
    for (label, tiles), height in zip(scaled, heights, strict=True):
        _label(draw, (_PADDING, y + _PADDING // 2), label, width - 2 * _PADDING)
        for column, tile in enumerate(tiles):
            x = _PADDING + (_PADDING + max_tile) * column
            _label(draw, (x, y + _LINE + _PADDING // 2), tile.label, max_tile, keep_end=True)
            sheet.paste(tile.image, (x, y + 2 * _LINE))
        y += height
    return sheet


def label_font(text: str) -> Font:
    """A font for the text: Pillow's own, or an installed CJK font if the text needs one."""
    cjk = _cjk_font() if needs_cjk(text) else None
    return cjk if cjk is not None else ImageFont.load_default(_LABEL_SIZE)


def can_write(text: str) -> bool:
    """Whether `label_font` has the glyphs of a text; false for CJK text if no such font is installed."""
    return not needs_cjk(text) or _cjk_font() is not None


def needs_cjk(text: str) -> bool:
    """Whether a text has Chinese, Japanese or Korean characters."""
    return any(ord(character) > 0x2E7F for character in text)


@functools.cache
def _cjk_font() -> ImageFont.FreeTypeFont | None:
    for name in _CJK_FONTS:
        try:
            return ImageFont.truetype(name, _LABEL_SIZE)
        except OSError:
            continue
    return None


def _blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), "white")
    return sheet, ImageDraw.Draw(sheet)


def _scaled(image: Image.Image, longest: int) -> Image.Image:
    tile = image.convert("RGB")
    tile.thumbnail((longest, longest))
    return tile


def _one_line(text: str) -> str:
    """The text on one line of valid UTF-8, as Pillow needs it; a file name may be neither."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _label(
    draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, width: int, *, keep_end: bool = False
) -> None:
    whole = _one_line(text)
    font = label_font(whole)

    def shortened(length: int) -> str:
        end = length // 2 if keep_end else 0
        return whole if length == len(whole) else f"{whole[: length - end]}…{whole[len(whole) - end :]}"

    def is_too_wide(length: int) -> bool:
        return draw.textlength(shortened(length), font=font) > width

    # binary search for the first length that does not fit; a prompt may have thousands of characters
    length = bisect.bisect_left(range(1, len(whole) + 1), True, key=is_too_wide)
    draw.text(position, shortened(length), fill="black", font=font)


_TILES_A_ROW = 6
_MAX_TILE = 256


def write_bucket_sheet(samples: Sequence[Sample], path: Path) -> bool:
    """Writes the sheet as a PNG; returns false if file names need glyphs that no installed font has.

    A row is a bucket of a dataset, with up to six of its images: those that lose most to the crop, then others at even
    intervals. Raises `HyimgError` if an image cannot be read or the file cannot be written.
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
    counts = {
        "upscaled": sum(sample.is_upscaled for sample in samples),
        f"cropped by more than {CROP_LIMIT:.0%}": sum(sample.is_cropped for sample in samples),
    }
    tail = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{where}{bucket[0]}x{bucket[1]}: {len(samples)} image{'s' * (len(samples) > 1)}{tail}"


def _some(samples: Sequence[Sample]) -> list[Sample]:
    cropped = sorted(
        (sample for sample in samples if sample.is_cropped), key=lambda one: -one.placement.cropped_share
    )[:_TILES_A_ROW]
    others = [sample for sample in samples if sample not in cropped]
    count = min(len(others), _TILES_A_ROW - len(cropped))
    return cropped + [others[number * len(others) // count] for number in range(count)]


def _tile(sample: Sample) -> SheetTile:
    image = Image.fromarray(load_pixels(sample)[0])
    remarks = []
    if sample.is_upscaled:
        remarks.append(f"x{sample.placement.resized[0] / sample.image_size[0]:.1f}")
    if sample.is_cropped:
        remarks.append(f"{sample.placement.cropped_share:.0%} cropped")
    # with the subfolder, since names may repeat
    name = os.path.relpath(sample.image_path, sample.subset.image_root)
    return SheetTile(image, f"{name} ({', '.join(remarks)})" if remarks else name)
