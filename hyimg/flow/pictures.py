"""Latents to pictures: decoding, PNG files that say how they were made, and the contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from hyimg.cache.atomic import atomic_path
from hyimg.errors import RunError
from hyimg.model.vae import VAE

METADATA_KEY = "hyimg"
"""The PNG text chunk that holds the settings as JSON."""

_LABEL_SIZE = 16
_PADDING = 8
_MAX_TILE = 512
# Fonts with Chinese, Japanese and Korean glyphs, as Linux, Windows and macOS name them
_CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
)


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


def save_png(image: Image.Image, path: Path, settings: Mapping[str, object] | None) -> None:
    """Writes a PNG, whole or not at all, with its settings in the text chunk `hyimg` (None: without)."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False, default=str))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, object] | None:
    """The settings that `save_png` wrote, or None."""
    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    return json.loads(text) if isinstance(text, str) else None


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """One picture of many: `rows` of images under column labels, each row under its own label.

    Images are scaled down to 512 pixels on their longer side.
    """
    tiles = [[_tile(image) for image in row] for row in rows]
    widths = [max(row[i].width for row in tiles) for i in range(len(column_labels))]
    heights = [max(tile.height for tile in row) for row in tiles]
    line = _LABEL_SIZE + _PADDING
    width = sum(widths) + _PADDING * (len(widths) + 1)
    sheet = Image.new("RGB", (width, line + sum(heights) + (line + _PADDING) * len(rows) + _PADDING), "white")
    draw = ImageDraw.Draw(sheet)
    x = _PADDING
    for label, column_width in zip(column_labels, widths, strict=True):
        _label(draw, (x, _PADDING // 2), label, column_width)
        x += column_width + _PADDING
    y = line
    for label, height, row in zip(row_labels, heights, tiles, strict=True):
        _label(draw, (_PADDING, y + _PADDING // 2), label, width - 2 * _PADDING)
        x, y = _PADDING, y + line
        for tile, column_width in zip(row, widths, strict=True):
            sheet.paste(tile, (x, y))
            x += column_width + _PADDING
        y += height + _PADDING
    return sheet


def _tile(image: Image.Image) -> Image.Image:
    tile = image.convert("RGB")
    tile.thumbnail((_MAX_TILE, _MAX_TILE))
    return tile


def _label(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, width: int) -> None:
    text = " ".join(text.split())  # Pillow measures and draws single lines only
    font = label_font(text)
    if draw.textlength(text, font=font) > width:
        while text and draw.textlength(text + "…", font=font) > width:
            text = text[:-1]
        text += "…"
    draw.text(position, text, fill="black", font=font)


def label_font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that can write the text: Pillow's own, or an installed CJK one where it is needed and there."""
    if any(ord(character) > 0x2E7F for character in text):
        for name in _CJK_FONTS:
            try:
                return ImageFont.truetype(name, _LABEL_SIZE)
            except OSError:
                continue
    return ImageFont.load_default(_LABEL_SIZE)
