"""The judge is right about drawn pictures, also damaged ones, and does not name what it does not know."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks.micro.judge import ASPECTS, judge
from hyimg.demo.world import (
    COLORS,
    LETTERS,
    NEW_SHAPES,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    draw,
    held_out_scenes,
    training_scene,
)


def noisy(picture, number):
    noise = np.random.default_rng(number).normal(0, 15, (128, 128, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def blurred(picture, number):
    return picture.filter(ImageFilter.GaussianBlur(1.5))


def compressed(picture, number):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=25)
    return Image.open(file)


def faded(picture, number):
    """Half of the way to grey, as a decoder may leave it that is not sure: a third of the contrast gone."""
    return Image.fromarray((128 + 0.8 * (np.asarray(picture).astype(float) - 128)).astype(np.uint8))


DAMAGE = {"none": lambda p, n: p, "noise": noisy, "blur": blurred, "jpeg": compressed, "faded": faded}


@pytest.mark.parametrize("damage", DAMAGE)
def test_pictures_are_judged_right(damage):
    scenes = [*held_out_scenes(40), *(training_scene(7, number) for number in range(40))]
    wrong = []
    for number, scene in enumerate(scenes):
        verdict = judge(DAMAGE[damage](Image.fromarray(draw(scene, 7, number)), number))
        if not verdict.right(scene, ASPECTS):
            wrong.append((scene, verdict))
    assert len(wrong) <= 2, wrong


def picture(**changes) -> Image.Image:
    scene = Scene("circle", "red", "blue", "in the middle", "large")
    return Image.fromarray(draw(replace(scene, **changes)))


@pytest.mark.parametrize(
    ("aspect", "names"),
    [
        ("shape", [*SHAPES, *NEW_SHAPES]),
        ("color", [c for c in COLORS if c != "blue"]),
        ("background", [c for c in COLORS if c != "red"]),
        ("position", POSITIONS),
        ("size", SIZES),
        ("letter", [None, *LETTERS]),
    ],
)
def test_every_name_of_the_world_is_known(aspect, names):
    assert [getattr(judge(picture(**{aspect: name})), aspect) for name in names] == list(names)


def test_the_verdict_does_not_follow_the_caption():
    scene = Scene("circle", "red", "blue", "in the middle", "large")
    verdict = judge(picture())
    for aspect, other in (("shape", "square"), ("color", "green"), ("background", "white"), ("letter", "A")):
        assert verdict.right(scene, (aspect,))
        assert not verdict.right(replace(scene, **{aspect: other}), (aspect,))


def test_what_is_no_shape_of_the_world_has_no_name():
    half = np.full((128, 128, 3), 20, np.uint8)
    half[40:90, 20:60], half[30:40, 50:80], half[84:90, 60:100] = 240, 240, 240
    verdict = judge(Image.fromarray(half))
    assert (verdict.shape, verdict.color, verdict.background, verdict.letter) == (
        None,
        "white",
        "black",
        None,
    )
    plain = judge(Image.fromarray(np.full((128, 128, 3), 20, np.uint8)))
    assert (plain.shape, plain.color, plain.position, plain.background) == (None, None, None, "black")


def test_grey_is_no_color_of_the_world():
    assert judge(Image.fromarray(np.full((128, 128, 3), 128, np.uint8))).background is None


def test_pure_noise_is_rarely_a_scene():
    found = [
        judge(Image.fromarray(np.random.default_rng(n).integers(0, 256, (128, 128, 3), np.uint8)))
        for n in range(8)
    ]
    assert all(verdict.shape is None for verdict in found)
