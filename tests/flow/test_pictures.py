from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from hyimg.checkpoints.architecture import VAE_TINY
from hyimg.errors import RunError
from hyimg.model.vae import VAE
from hyimg.rendering.decoding import decode_image
from hyimg.reports.sheets import contact_sheet


def test_a_picture_that_is_not_finite_is_a_failed_run() -> None:
    torch.manual_seed(0)
    vae = VAE(VAE_TINY)
    latent = torch.zeros(1, VAE_TINY.latent_channels, 1, 2)
    assert decode_image(vae, latent).size == (64, 32)
    bias = next(parameter for name, parameter in vae.named_parameters() if name == "decoder.conv_out.bias")
    with torch.no_grad():
        bias[0] = float("inf")
    with pytest.raises(RunError, match="the decoded image is not finite") as caught:
        decode_image(vae, latent)
    assert "`--mixed_precision no`" in str(caught.value.hint)


def test_pixel_values_are_rounded_and_clipped() -> None:
    vae = VAE(VAE_TINY)
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.002, 0.006, 1.0, 1.5])
    vae.decode = lambda latent_BCHW: levels.expand(1, 3, 1, -1)  # type: ignore[method-assign]
    image = decode_image(vae, torch.zeros(1, VAE_TINY.latent_channels, 1, 1))
    # (level + 1) * 127.5; of 127.5 the even neighbour
    assert [image.getpixel((x, 0)) for x in range(7)] == [(v, v, v) for v in (0, 0, 128, 128, 128, 255, 255)]


def test_labels_of_several_lines_are_written_on_one() -> None:
    tile = Image.new("RGB", (300, 40))
    several = contact_sheet([[tile]], ["a cat\nand\t a dog"], ["one\ntwo"])
    one = contact_sheet([[tile]], ["a cat and a dog"], ["one two"])
    assert several.tobytes() == one.tobytes()


def test_names_that_differ_in_their_ends_are_told_apart_on_narrow_columns() -> None:
    tile = Image.new("RGB", (64, 64))
    early, late, other = (
        contact_sheet([[tile]], ["a cat"], [name])
        for name in ("lora-step00000002", "lora-step00000004", "dog-step00000002")
    )
    assert early.tobytes() != late.tobytes()
    assert early.tobytes() != other.tobytes()
    assert early.size == late.size == other.size


def test_a_sheet_of_small_pictures_has_room_for_their_prompts() -> None:
    tile = Image.new("RGB", (64, 64))
    label = "a large yellow ring on the left, blue background"
    whole, cut = (contact_sheet([[tile]], [text], ["base"]) for text in (label, label[:-1]))
    assert whole.width > 64 * 3
    assert whole.tobytes() != cut.tobytes()
    long = contact_sheet([[tile]], [label * 9], ["base"])
    assert long.width < 600


def test_a_label_of_thousands_of_characters_is_measured_a_few_times(monkeypatch) -> None:
    measured = 0
    length = ImageDraw.ImageDraw.textlength

    def textlength(self, text, *args, **kwargs):
        nonlocal measured
        measured += 1
        return length(self, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "textlength", textlength)
    contact_sheet([[Image.new("RGB", (64, 64))]], ["a cat " * 5000], ["base"])
    assert measured < 50
