"""What the demo teaches: pictures of a shape that the model was never shown, and prompts that no picture gave away."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from PIL import Image

from benchmarks.micro.judge import judge
from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.scan import scan
from hyimg.demo.concept import (
    NUM_KNOWN,
    NUM_PICTURES,
    POSITION,
    SHAPE,
    TRIGGER,
    DemoFolder,
    concept_prompt,
    concept_scenes,
    known_scenes,
    new_concept_scenes,
    write_concept,
    write_known,
)
from hyimg.demo.world import COLORS, POSITIONS, SHAPES, SIZES, caption, is_held_out, training_scene
from hyimg.stages.demo import COMMANDS, PROMPTS, dataset_text


@pytest.mark.parametrize(
    ("write", "scenes"), [(write_concept, concept_scenes()), (write_known, known_scenes())]
)
def test_each_picture_is_what_its_caption_says(tmp_path, write, scenes):
    write(tmp_path)
    paths = sorted(tmp_path.glob("*.png"))
    assert len(paths) == len(scenes)
    right = 0
    for path, scene in zip(paths, scenes, strict=True):
        text = path.with_suffix(".txt").read_text().strip()
        name = TRIGGER if scene.shape == SHAPE else scene.shape
        assert name in text.replace(",", "").split()
        for word in (scene.color, scene.background, scene.position, scene.size):
            assert word in text
        right += judge(Image.open(path)).right(scene, ("shape", "color", "background", "position", "size"))
    assert right >= 0.95 * len(scenes)


def test_what_stays_as_it_is_is_shown_evenly_and_not_what_is_measured():
    scenes = known_scenes()
    assert Counter(scene.shape for scene in scenes) == dict.fromkeys(SHAPES, NUM_KNOWN // len(SHAPES))
    assert {scene.position for scene in scenes} == set(POSITIONS)
    assert {scene.size for scene in scenes} == set(SIZES)
    assert not any(is_held_out(scene.shape, scene.color, scene.background) for scene in scenes)


def test_the_model_knows_neither_the_shape_nor_the_word():
    assert SHAPE not in SHAPES
    words = " ".join(caption(training_scene(1, number), number) for number in range(500))
    assert TRIGGER not in words
    assert SHAPE not in words


def test_colours_are_taught_evenly_and_measured_in_pairs_that_no_picture_has():
    taught, measured = concept_scenes(), new_concept_scenes(100)
    for field in ("color", "background"):
        counts = Counter(getattr(scene, field) for scene in taught)
        assert set(counts) == set(COLORS)
        assert max(counts.values()) - min(counts.values()) <= 1
    pairs = {(scene.color, scene.background) for scene in taught}
    assert len(pairs) == NUM_PICTURES
    assert not pairs & {(scene.color, scene.background) for scene in measured}
    assert all(scene.color != scene.background for scene in (*taught, *measured))
    assert len(set(measured)) == 36, "all other pairs; the seeds are a hundred"


def test_the_sheet_and_infer_show_pairs_of_colours_that_no_picture_has():
    taught = {(scene.color, scene.background) for scene in concept_scenes()}
    lines = [line for line in (*PROMPTS.splitlines(), *COMMANDS) if f" {TRIGGER} " in line]
    assert len(lines) == 3
    for line in lines:
        color, background = re.search(rf"(\w+) {TRIGGER} {POSITION}, (\w+) background", line).groups()
        assert (color, background) not in taught
        assert {color, background} <= set(COLORS)


def test_every_colour_is_trained_when_a_fifth_is_held_back(tmp_path):
    folder = DemoFolder(tmp_path)
    for pictures, write in ((folder.images, write_concept), (folder.known, write_known)):
        pictures.mkdir()
        write(pictures)
    folder.dataset.write_text(dataset_text(folder))
    found = scan(load_dataset_file(folder.dataset))
    regular = [sample for sample in found.samples if sample.subset.is_reg]
    taught = [sample for sample in found.samples if not sample.subset.is_reg]
    assert (len(taught), len(regular), len(found.validation)) == (16, NUM_KNOWN, 4)
    assert sum(sample.num_repeats for sample in taught) == sum(sample.num_repeats for sample in regular)
    scenes = {concept_prompt(scene, number): scene for number, scene in enumerate(concept_scenes())}
    trained = [scenes[sample.prompts[0]] for sample in taught]
    assert {scene.color for scene in trained} == set(COLORS)
    assert {scene.background for scene in trained} == set(COLORS)
