from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from hyimg.data.images import decode, filter_for, probe, resize_and_crop


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def marked() -> Image.Image:
    """48x32, white, with a red corner at the upper left."""
    image = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 15, 7), fill="red")
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_seen_upright_whatever_its_exif_says(orientation: int) -> None:
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
    data = encoded(stored, exif=exif)
    assert probe(data) == (48, 32)
    assert np.array_equal(decode(data).rgb_HWC, np.asarray(marked()))


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
