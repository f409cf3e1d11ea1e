"""Contact sheets: many small pictures with labels on one large one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

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
class Tile:
    """A picture and the line of text above it."""

    image: Image.Image
    label: str


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """One picture of many: `rows` of images under column labels, each row under its own label.

    Images are scaled down to 512 pixels on their longer side.
    """
    tiles = [[_scaled(image, MAX_TILE) for image in row] for row in rows]
    widths = [max(row[i].width for row in tiles) for i in range(len(column_labels))]
    heights = [max(tile.height for tile in row) for row in tiles]
    width = sum(widths) + _PADDING * (len(widths) + 1)
    longest_label = max(label_font(label).getlength(_one_line(label)) for label in row_labels)
    # small pictures are given room for their prompts
    width = max(width, min(math.ceil(longest_label) + 2 * _PADDING, MAX_TILE + 2 * _PADDING))
    sheet, draw = _blank(width, _LINE + sum(heights) + (_LINE + _PADDING) * len(rows) + _PADDING)
    x = _PADDING
    for label, column_width in zip(column_labels, widths, strict=True):
        # checkpoints of a run differ in the ends of their names
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


def tile_sheet(rows: Sequence[tuple[str, Sequence[Tile]]], *, max_tile: int) -> Image.Image:
    """One picture of labelled rows of labelled tiles; rows may differ in length.

    Images are scaled down to `max_tile` pixels on their longer side.
    """
    scaled = [
        (label, [Tile(_scaled(tile.image, max_tile), tile.label) for tile in tiles]) for label, tiles in rows
    ]
    width = max(_PADDING + (_PADDING + max_tile) * len(tiles) for _, tiles in scaled)
    heights = [2 * _LINE + max(tile.image.height for tile in tiles) + _PADDING for _, tiles in scaled]
    sheet, draw = _blank(width, sum(heights) + _PADDING)
    y = 0
    for (label, tiles), height in zip(scaled, heights, strict=True):
        _label(draw, (_PADDING, y + _PADDING // 2), label, width - 2 * _PADDING)
        for column, tile in enumerate(tiles):
            x = _PADDING + (_PADDING + max_tile) * column
            _label(draw, (x, y + _LINE + _PADDING // 2), tile.label, max_tile)
            sheet.paste(tile.image, (x, y + 2 * _LINE))
        y += height
    return sheet


def label_font(text: str) -> Font:
    """A font that can write the text: Pillow's own, or an installed CJK one where it is needed and there."""
    cjk = _cjk_font() if needs_cjk(text) else None
    return cjk if cjk is not None else ImageFont.load_default(_LABEL_SIZE)


def can_write(text: str) -> bool:
    """Whether `label_font` has the glyphs of a text; false for CJK text where no such font is installed."""
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
    """What can be measured and drawn: Pillow takes single lines only, and a file's name need not be UTF-8."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _label(
    draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, width: int, *, keep_end: bool = False
) -> None:
    text = _one_line(text)
    font = label_font(text)
    whole = text
    length = len(whole)
    while length and draw.textlength(text, font=font) > width:
        length -= 1
        end = length // 2 if keep_end else 0
        text = f"{whole[: length - end]}…{whole[len(whole) - end :]}"
    draw.text(position, text, fill="black", font=font)
