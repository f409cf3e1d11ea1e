from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, Jpeg2KImagePlugin, PngImagePlugin

from hyimg.data import images, pixels
from hyimg.data.buckets import Size
from hyimg.data.images import (
    area_average,
    decode,
    decoding_bytes,
    filter_for,
    probe,
    resize_and_crop,
    traits_of,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def marked() -> Image.Image:
    """48x32, white, with a red corner at the upper left."""
    image = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 15, 7), fill="red")
    return image


# Pillow itself turns a TIFF as it loads it, and leaves the others as they are
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_once_in_every_format(kind: str, orientation: int) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = marked() if undo is None else marked().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, quality=100)
    assert probe(data) == (48, 32)
    difference = decode(data).rgb_HWC.astype(int) - np.asarray(marked())
    assert difference.shape == (32, 48, 3)
    assert (np.abs(difference) > 100).mean() < 0.02  # JPEG and WebP blur the corner's edge


def test_every_kind_of_image_becomes_rgb_of_8_bits() -> None:
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    eight = np.rint(ramp / 257).astype(np.uint8)
    sixteen = decode(encoded(Image.fromarray(ramp)))
    assert np.abs(sixteen.rgb_HWC[:, :, 0].astype(int) - eight).max() <= 1  # not cut off at 255
    tiff = decode(encoded(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"))
    assert np.abs(tiff.rgb_HWC[:, :, 0].astype(int) - eight).max() <= 1
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "RGB"):
        kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
        rgb_HWC = decode(encoded(marked().convert(mode), kind)).rgb_HWC
        assert rgb_HWC.shape == (32, 48, 3)
        assert rgb_HWC.dtype == np.uint8
        assert rgb_HWC[31, 47].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white_or_is_kept_as_a_mask(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (10, 10, 10, 255))
    image.paste((10, 10, 10, 0), (0, 0, 16, 32))
    pixels = decode(encoded(image.convert(mode)))
    assert pixels.alpha_HW is not None
    assert pixels.alpha_HW[0].tolist() == [0] * 16 + [255] * 16
    shown = pixels.over_white()
    assert shown.alpha_HW is None
    assert shown.rgb_HWC[0, 0].tolist() == [255] * 3
    assert np.abs(shown.rgb_HWC[0, 31].astype(int) - 10).max() <= 1  # a palette may round
    assert decode(encoded(marked().convert("RGBA"))).alpha_HW is None  # wholly opaque


def test_a_colour_profile_is_applied_and_a_broken_one_ignored() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode(encoded(marked())).rgb_HWC
    assert np.array_equal(decode(encoded(marked(), icc_profile=srgb)).rgb_HWC, plain)
    assert np.array_equal(decode(encoded(marked(), icc_profile=b"rubbish")).rgb_HWC, plain)
    # a profile whose red is sRGB's green and the other way round
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    corner = decode(encoded(marked(), icc_profile=swapped)).rgb_HWC[0, 0]
    assert np.abs(corner.astype(int) - [0, 255, 0]).max() <= 2  # rounding of the profile's numbers


def test_a_profile_or_text_over_the_limits_is_dropped_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "PROFILE_BYTES", 1_500_000)
    plain = decode(encoded(marked())).rgb_HWC
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    # a PNG's is compressed, and Pillow takes at most a megabyte of it
    for kind in ("PNG", "TIFF"):
        path = tmp_path / f"large.{kind}"
        path.write_bytes(encoded(marked(), kind, icc_profile=swapped + bytes(1_500_000)))
        assert probe(path.read_bytes()) == (48, 32)
        assert np.array_equal(decode(path.read_bytes()).rgb_HWC, plain)
        assert traits_of(path) == {"profile"}
    medium = encoded(marked(), icc_profile=swapped + bytes(1_200_000))
    assert np.abs(decode(medium).rgb_HWC[0, 0].astype(int) - [0, 255, 0]).max() <= 2
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_200_000, zip=True)
    assert np.array_equal(decode(encoded(marked(), pnginfo=text)).rgb_HWC, plain)


@pytest.mark.parametrize("kind", ["gray16", "float", "gray32", "RGBA", "LA", "P with transparency", "CMYK"])
def test_an_image_of_several_strips_is_that_of_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (61, 40, 4), np.uint8)
    image = Image.fromarray(noise)
    if kind == "gray16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif kind == "float":  # of up to 1 in the first strips, and of up to 255 in the last
        values = noise[..., 0] / np.where(np.arange(61) < 50, 255, 1)[:, None]
        image = Image.fromarray(values.astype(np.float32))
    elif kind == "gray32":  # of up to 255, and then of up to 255,000
        values = noise[..., 0] * np.where(np.arange(61) < 50, 1, 1000)[:, None]
        image = Image.fromarray(values.astype(np.int32))
    elif kind == "P with transparency":
        image = image.quantize(16)
    else:
        image = image.convert(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "TIFF" if kind in ("float", "gray32", "CMYK") else "PNG", exif=exif)
    whole = decode(data)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 40 * 7)
    strips = decode(data)
    assert np.array_equal(strips.rgb_HWC, whole.rgb_HWC)
    assert whole.rgb_HWC.shape == (40, 61, 3)
    assert (
        (strips.alpha_HW is None)
        == (whole.alpha_HW is None)
        == (kind in ("gray16", "float", "gray32", "CMYK"))
    )
    assert np.array_equal(strips.over_white().rgb_HWC, whole.over_white().rgb_HWC)
    if strips.alpha_HW is not None:
        assert np.array_equal(strips.alpha_HW, whole.alpha_HW)


@pytest.mark.parametrize("size", [(640, 480), (641, 479), (30, 40)])
def test_a_jpeg_2000_is_probed_at_a_small_part_of_its_size(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG2000", quality_layers=[20])
    loaded: list[Size] = []

    def load(image: Image.Image) -> object:
        pixels = original(image)
        loaded.append(image.size)
        return pixels

    original = Jpeg2KImagePlugin.Jpeg2KImageFile.load
    monkeypatch.setattr(Jpeg2KImagePlugin.Jpeg2KImageFile, "load", load)
    assert probe(data) == size
    # a side of less than 32 pixels has fewer levels
    assert loaded[-1] == (size if min(size) < 32 else (20, 15) if size == (640, 480) else (21, 15))
    with pytest.raises(ValueError, match="broken data stream"):
        probe(data[:-50])


def test_the_first_frame_of_an_animation_counts() -> None:
    data = encoded(marked(), "GIF", save_all=True, append_images=[Image.new("RGB", (48, 32), "blue")])
    assert decode(data).rgb_HWC[31, 47].tolist() == [255, 255, 255]


def test_broken_files_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
    for data in (encoded(noise, "JPEG")[:-9000], encoded(noise)[:-5000], b"no image", b""):
        for function in (probe, decode):
            with pytest.raises(ValueError):
                function(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too many pixels"):
        probe(encoded(noise))


def test_resize_and_crop_keep_the_centre() -> None:
    stripes_HWC = np.zeros((64, 128, 3), np.uint8)
    stripes_HWC[:, 32:96] = 200
    out_HWC = resize_and_crop(
        stripes_HWC, resized=(64, 32), crop=(16, 0), bucket=(32, 32), filter_name="area"
    )
    assert out_HWC.shape == (32, 32, 3)
    assert (out_HWC == 200).all()
    assert filter_for((100, 100), (64, 64), None) == "area"
    assert filter_for((100, 50), (64, 64), None) == "lanczos"
    assert filter_for((100, 50), (64, 64), "nearest") == "nearest"


@pytest.mark.parametrize("old", [(48, 40), (47, 13), (7, 5), (3, 70), (64, 1)])
@pytest.mark.parametrize("new", [(16, 8), (13, 5), (5, 7), (48, 40)])
def test_area_weighs_each_pixel_by_the_share_that_is_covered(old: Size, new: Size) -> None:
    """Against the definition in exact fractions, an enlarged side too; values are those of black and white noise."""
    pixels = np.random.default_rng(0).integers(0, 2, (old[1], old[0], 3), np.uint8) * 255
    rows, columns = (
        [[covered(j, i, n, m) for j in range(n)] for i in range(m)]
        for n, m in ((old[1], new[1]), (old[0], new[0]))
    )
    exact = np.array(rows) @ pixels.astype(object).transpose(2, 0, 1) @ np.array(columns).T
    expected = np.vectorize(round)(exact).astype(np.uint8).transpose(1, 2, 0)  # half to even, as np.rint
    assert np.array_equal(area_average(pixels, new), expected)
    assert np.array_equal(area_average(pixels[:, :, 0], new), expected[:, :, 0])


def covered(old_index: int, new_index: int, old: int, new: int) -> Fraction:
    """The share of a new pixel that lies over an old one, along an axis of `old` pixels that becomes `new`."""
    begin, end = Fraction(new_index * old, new), Fraction((new_index + 1) * old, new)
    return max(Fraction(0), min(end, Fraction(old_index + 1)) - max(begin, Fraction(old_index))) / (
        end - begin
    )


def test_area_keeps_the_mean_of_a_photo_that_takes_several_strips() -> None:
    photo = np.random.default_rng(1).integers(0, 256, (1201, 307, 3), np.uint8)
    small = area_average(photo, (97, 401))
    assert (
        np.abs(small.mean(axis=(0, 1)) - photo.mean(axis=(0, 1))).max() < 0.05
    )  # of 38897 roundings of up to 0.5
    striped = np.repeat(np.arange(256, dtype=np.uint8), 5)[
        :, None
    ]  # rows of 0, 1, 2, ...: each mean is known
    assert area_average(np.tile(striped, (1, 8)), (4, 256))[:, 0].tolist() == list(range(256))


def test_threads_wait_for_the_memory_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "available_bytes", lambda: 2_000_000_000)
    budget = pixels.MemoryBudget()
    in_use: list[int] = []
    peaks: list[list[int]] = []

    def hold(num_bytes: int) -> None:
        with budget.reserved(num_bytes):
            in_use.append(num_bytes)
            peaks.append(list(in_use))
            time.sleep(0.002)
            in_use.remove(num_bytes)

    sizes = [300_000_000] * 12 + [1_500_000_000] * 2 + [400_000_000] * 6
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, sizes))
    assert len(peaks) == len(sizes)
    assert all(sum(held) <= 1_000_000_000 or len(held) == 1 for held in peaks)
    assert max(map(len, peaks)) > 1
    with pytest.raises(ValueError, match=r"takes about 2\.1 GB of memory, and 2\.0 GB are free"):
        hold(2_100_000_000)


def test_the_memory_of_an_image_follows_from_its_header(tmp_path: Path) -> None:
    for kind, per_pixel in (("PNG", 8), ("JPEG", 14), ("JPEG2000", 24), ("WEBP", 16)):
        path = tmp_path / "image"
        path.write_bytes(encoded(marked(), kind))
        assert decoding_bytes(path) == path.stat().st_size + 48 * 32 * per_pixel
    path.write_bytes(b"no image")
    assert decoding_bytes(path) == 8
