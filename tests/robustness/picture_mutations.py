"""Damage to pictures: formats, modes, sizes in headers, chunks, and the settings that a picture carries."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

from PIL import Image, PngImagePlugin

from tests.robustness.mutations import Damaged, damage_bytes, damage_json, damage_text

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "ICO", "PPM", "TGA", "AVIF")
_MODES = {
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "TIFF": ["RGB", "RGBA", "CMYK", "L", "F", "I", "P", "1", "LAB", "YCbCr", "I;16"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "JPEG2000": ["RGB", "RGBA", "L", "LA"],
    "AVIF": ["RGB", "RGBA"],
}
# big-endian (">") or little-endian sizes of a header: (place, format)
_SIZES = {
    "PNG": [(16, ">I"), (20, ">I"), (24, "B"), (25, "B")],
    "BMP": [(18, "<i"), (22, "<i"), (28, "<H"), (10, "<I")],
    "GIF": [(6, "<H"), (8, "<H")],
    "TIFF": [(4, "<I"), (8, "<H"), (18, "<I"), (30, "<I")],
    "JPEG2000": [(48, ">I"), (52, ">I")],
    "ICO": [(4, "<H"), (14, "<I"), (18, "<I")],
    "TGA": [(12, "<H"), (14, "<H"), (16, "B")],
    "WEBP": [(4, "<I"), (16, "<I"), (26, "<H"), (28, "<H")],
}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(owned) show\n%%EOF\n"


def damage_picture(data: bytes, rng: random.Random, formats: Sequence[str] = PICTURE_FORMATS) -> Damaged:
    """A picture in another format and mode, with damaged bytes, sizes or metadata."""
    format = rng.choice(formats)
    kind = rng.choice(["bytes", "bytes", "sizes", "sizes", "mode", "info", "foreign", "chunk"])
    if kind == "foreign":
        other = rng.choice(
            [
                EPS,
                b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                b"%PDF-1.4\n",
                b"\x7fELF",
                b"P6 99999 99999 255\n",
            ]
        )
        return other, f"picture: {other[:12]!r}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded, mode = _encoded(data, format, rng, with_info=kind == "info")
    words = f"{format} {mode}"
    if kind == "bytes":
        damaged, more = damage_bytes(encoded, rng)
        return damaged, f"picture: {words}, {more}"
    if kind == "sizes" and format in _SIZES:
        place, form = rng.choice(_SIZES[format])
        out = bytearray(encoded)
        value = rng.choice([0, 1, 13_000, 65_535, 2**31 - 1, 2**32 - 1]) & (256 ** struct.calcsize(form) - 1)
        out[place : place + struct.calcsize(form)] = value.to_bytes(
            struct.calcsize(form), "big" if ">" in form else "little"
        )
        return bytes(out), f"picture: {words}, {value} at {place}"
    if kind == "chunk" and format == "PNG":
        return _png_chunk(encoded, rng), f"picture: {words}, a chunk"
    return encoded, f"picture: {words}{', metadata' if kind == 'info' else ''}"


def _encoded(data: bytes, format: str, rng: random.Random, *, with_info: bool) -> tuple[bytes, str]:
    with Image.open(io.BytesIO(data)) as source:
        image = source.convert("RGB")
    mode = rng.choice(_MODES.get(format, ["RGB"]))
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    if rng.random() < 0.2:
        image = image.resize(rng.choice([(1, 1), (1, 400), (400, 1), (33, 32), (2000, 3)]))
    extra: dict[str, Any] = {}
    if with_info:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([0, 3, 6, 8, 9, 65535])
        extra["exif"] = rng.choice([exif.tobytes(), b"Exif\0\0" + rng.randbytes(40), b""])
        if format in ("PNG", "JPEG", "TIFF", "WEBP"):
            extra["icc_profile"] = rng.choice([rng.randbytes(200), b"\0" * 100_000, b""])
    out = io.BytesIO()
    try:
        image.save(out, format, **extra)
    except Exception:  # this Pillow, or this mode, cannot
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG")
    return out.getvalue(), mode


def _png_chunk(data: bytes, rng: random.Random) -> bytes:
    """A chunk behind the header whose checksum is right."""
    bomb = zlib.compress(b"\0" * 30_000_000, 9)
    kind, content = rng.choice(
        [
            (b"zTXt", b"parameters\0\0" + bomb),
            (b"iTXt", b"hyimg\0\1\0\0\0" + bomb),
            (b"iCCP", b"icc\0\0" + bomb),
            (b"tEXt", b"parameters\0" + b"\x1b[31m" * 1000),
            (b"tRNS", b"\0" * 300),
            (b"PLTE", b"\0" * 7),
            (b"gAMA", b""),
            (b"cHRM", b"\0"),
            (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
            (b"eXIf", rng.randbytes(64)),
            (b"\0\0\0\0", b"x"),
        ]
    )
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


def damage_mask(data: bytes, rng: random.Random) -> Damaged:
    return damage_picture(data, rng, ("PNG", "TIFF", "JPEG"))


def damage_png_settings(data: bytes, rng: random.Random) -> Damaged:
    """A picture whose settings, a JSON text in a PNG chunk, are damaged."""
    if rng.random() < 0.3:
        return damage_picture(data, rng, ("PNG",))
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        texts = dict(getattr(image, "text", {}))
    key = rng.choice(list(texts) or ["hyimg"])
    text, words = texts.get(key, "{}").encode(), "no text"
    if text[:1] in (b"{", b"["):
        text, words = damage_json(text, rng)
    else:
        text, words = damage_text(text, rng)
    info = PngImagePlugin.PngInfo()
    for name, value in {**texts, key: text.decode("utf-8", "replace")}.items():
        info.add_itxt(name, value, zip=rng.random() < 0.3)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue(), f"settings `{key}`: {words}"
