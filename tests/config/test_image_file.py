"""Image files: the one place that opens them, the formats it takes, and what it makes of a decoder's exceptions."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from hyimg.cache.index import Index
from hyimg.config.image_file import FORMATS, is_whole, opened_image, read_settings
from hyimg.data.images import decode, probe, traits_of
from hyimg.data.scan import measure
from hyimg.errors import HyimgError

ROOT = Path(__file__).parents[2]
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
showpage
%%EOF
"""
READERS = {
    "probe": lambda path: probe(path.read_bytes()),
    "decode": lambda path: decode(path.read_bytes()),
    "traits_of": traits_of,
    "traits_of a mask": lambda path: traits_of(path, is_mask=True),
    "read_settings": read_settings,
}


def test_every_image_is_opened_by_one_function() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("hyimg", "plugins")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\bImage\.open\(|ImageFile\.Parser|\bimread\(|read_image\(", line)
        and "tests" not in path.parts
    ]
    assert [place.partition(":")[0] for place in calls] == ["hyimg/config/image_file.py"]


def test_no_decoder_that_starts_a_program_is_among_the_formats() -> None:
    assert not {"EPS", "WMF", "IPTC", "MPEG", "GRIB", "HDF5", "BUFR"} & set(FORMATS)


@pytest.mark.parametrize("reader", READERS)
def test_postscript_named_as_a_png_does_not_start_ghostscript(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ghostscript(*arguments: object, **more: object) -> object:
        started.append(arguments)
        return Image.new("RGB", (16, 16)).im

    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / "cat.png"
    path.write_bytes(EPS)
    with Image.open(path) as image:  # otherwise the test could not fail
        image.load()
    assert started
    started.clear()
    with pytest.raises((ValueError, HyimgError), match="supported format|cannot be read as"):
        READERS[reader](path)
    assert not is_whole(path)
    assert not started


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "jp2", "ico", "tga", "ppm", "dib"]
)
def test_formats_of_datasets_are_decoded(suffix: str) -> None:
    format_name = {"jpg": "JPEG", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (250, 0, 0)).save(buffer, format_name)
    assert probe(buffer.getvalue()) == (32, 32)
    assert np.abs(decode(buffer.getvalue()).rgb_HWC.astype(int) - (250, 0, 0)).max() <= 6


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack requires a buffer of 4 bytes"),
        *(kind("broken") for kind in (KeyError, IndexError, AttributeError, RecursionError, SyntaxError)),
        *(kind("broken") for kind in (ZeroDivisionError, OverflowError, NotImplementedError, AssertionError)),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_a_bad_image_with_its_name(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cat.png"
    Image.new("RGB", (32, 32)).save(path)

    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    measured, bad = measure([path], Index(None))
    assert not measured
    assert list(bad) == [path]
    assert bad[path]
    with pytest.raises(ValueError):
        decode(path.read_bytes())
    assert not is_whole(path)


def test_an_error_of_ours_in_the_block_stays_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.new("RGB", (32, 32)).save(path)
    with pytest.raises(HyimgError, match="ours"), opened_image(path):
        raise HyimgError("ours")
