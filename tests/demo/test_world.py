"""The small world: functions of keys, captions that tell what is drawn, and combinations that are never trained."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hyimg.demo.world import (
    COLORS,
    LETTER_CELL,
    LETTERS,
    NEW_SHAPES,
    NUM_FULL_PHRASINGS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    combinations,
    draw,
    draw_shape,
    held_out_scenes,
    is_held_out,
    letter_color,
    letter_mask,
    phrase,
    training_scene,
    unit_area,
)
from hyimg.encoders.glyph import quoted_texts

PLAIN = Scene("circle", "red", "blue", "on the left", "large", "A")


def test_scenes_pictures_and_captions_are_functions_of_their_keys():
    assert training_scene(3, 5) == training_scene(3, 5) != training_scene(3, 6)
    assert np.array_equal(draw(PLAIN, 3, 5), draw(PLAIN, 3, 5))
    assert not np.array_equal(draw(PLAIN, 3, 5), draw(PLAIN, 3, 6))
    assert caption(PLAIN, 3, 5) == caption(PLAIN, 3, 5)
    assert len({caption(PLAIN, 3, number) for number in range(40)}) == 2 * (NUM_FULL_PHRASINGS + 1)


def test_a_picture_has_the_same_pixels_everywhere():
    pictures = b"".join(draw(replace(PLAIN, shape=shape), 1).tobytes() for shape in (*SHAPES, *NEW_SHAPES))
    assert hashlib.sha256(pictures).hexdigest()[:16] == "08cb0e0f63c092ee"


def test_held_out_combinations_are_never_trained():
    trained = {(s.shape, s.color, s.background) for s in (training_scene(0, n) for n in range(4000))}
    held_out = set(combinations(held_out=True))
    assert trained == set(combinations(held_out=False))
    assert not trained & held_out
    assert 30 <= len(held_out) <= 60
    scenes = held_out_scenes(200)
    assert len(set(scenes)) == 200
    assert {(s.shape, s.color, s.background) for s in scenes} <= held_out
    assert all(is_held_out(s.shape, s.color, s.background) for s in scenes)


def test_every_word_of_a_held_out_prompt_is_trained():
    def words(scenes):
        return {
            w for n, s in enumerate(scenes) for w in caption(s, n).replace('"', " ").replace(",", " ").split()
        }

    assert words(held_out_scenes(200)) <= words(training_scene(0, n) for n in range(2000))


def test_scenes_are_spread_evenly():
    scenes = [training_scene(1, number) for number in range(3000)]
    for field, names in (("shape", SHAPES), ("color", COLORS), ("position", POSITIONS), ("size", SIZES)):
        shares = Counter(getattr(scene, field) for scene in scenes)
        assert set(shares) == set(names)
        assert min(shares.values()) > 0.7 * 3000 / len(names)
    with_letter = Counter(scene.letter for scene in scenes)
    assert 0.25 < 1 - with_letter[None] / 3000 < 0.35
    assert set(with_letter) == {None, *LETTERS}


@pytest.mark.parametrize("phrasing", range(NUM_FULL_PHRASINGS + 1))
def test_captions_say_what_is_drawn_and_quote_the_letter(phrasing):
    text = phrase(PLAIN, phrasing)
    told = [PLAIN.shape, PLAIN.color, PLAIN.background]
    told += [PLAIN.position, PLAIN.size] if phrasing < NUM_FULL_PHRASINGS else []
    assert all(word in text for word in told)
    assert quoted_texts(text) == ["A"]
    assert quoted_texts(phrase(replace(PLAIN, letter=None), phrasing)) == []


@pytest.mark.parametrize("shape", [*SHAPES, *NEW_SHAPES])
def test_shapes_stay_in_the_picture_and_out_of_the_corner_of_letters(shape):
    for position, (number, size) in product(POSITIONS, enumerate(SIZES)):
        scene = Scene(shape, "black", "white", position, size)
        for key in range(6):
            picture_HWC = draw(scene, number, key).astype(int)
            differs_HW = abs(picture_HWC - picture_HWC[0, 0]).max(2) > 40
            assert differs_HW.any()
            assert not differs_HW[LETTER_CELL:, LETTER_CELL:].any()
            border = np.concatenate(
                [differs_HW[:5].ravel(), differs_HW[-5:].ravel(), differs_HW[:, :5].ravel()]
            )
            assert not border.any()


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi), ("square", 4 * 0.86**2), ("ring", np.pi * (1 - 0.55**2))]
)
def test_areas_are_those_of_the_formulas(shape, area):
    assert unit_area(shape) == pytest.approx(area, rel=0.01)
    assert draw_shape(shape, (64, 64), 20, 128).sum() == pytest.approx(400 * area, rel=0.01)


def test_letters_are_told_apart_and_contrast_with_their_background():
    masks = [letter_mask(letter) for letter in LETTERS]
    for n, mask in enumerate(masks):
        assert all((mask != other).mean() > 0.05 for other in masks[:n])
    for background, shade in COLORS.items():
        assert abs(np.array(shade) - np.array(COLORS[letter_color(background)])).max() > 140
    with_letter, without = draw(PLAIN), draw(replace(PLAIN, letter=None))
    changed_HW = (with_letter != without).any(2)
    assert changed_HW[LETTER_CELL:, LETTER_CELL:].sum() == letter_mask("A").sum() == changed_HW.sum()
