"""What the demo teaches: pictures of a shape that the model was never shown, and prompts that no picture gave away."""

from __future__ import annotations

from collections import Counter

from PIL import Image

from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.samples import scan
from hyimg.micro.concept import (
    NUM_PICTURES,
    SHAPE,
    TRIGGER,
    concept_prompt,
    concept_scenes,
    new_concept_scenes,
    write_concept,
)
from hyimg.micro.demo_folder import DemoFolder
from hyimg.micro.judge import judge
from hyimg.micro.outlines import SHAPES
from hyimg.micro.world import COLORS, POSITIONS, SIZES, caption, training_scene
from hyimg.stages.demo import DATASET


def test_each_picture_is_what_its_caption_says(tmp_path):
    write_concept(tmp_path)
    paths = sorted(tmp_path.glob("*.png"))
    assert len(paths) == NUM_PICTURES
    right = 0
    for path, scene in zip(paths, concept_scenes(), strict=True):
        text = path.with_suffix(".txt").read_text().strip()
        assert TRIGGER in text.replace(",", "").split()
        for word in (scene.color, scene.background, scene.position, scene.size):
            assert word in text
        right += judge(Image.open(path)).right(scene, ("shape", "color", "background", "position", "size"))
    assert right >= NUM_PICTURES - 1


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
    assert len({concept_prompt(scene, number) for number, scene in enumerate(measured)}) == 100


def test_every_colour_place_and_size_is_trained_when_a_fifth_is_held_back(tmp_path):
    folder = DemoFolder(tmp_path)
    folder.images.mkdir()
    write_concept(folder.images)
    folder.dataset.write_text(DATASET.format(images=folder.images.as_posix()))
    found = scan(load_dataset_file(folder.dataset))
    assert (len(found.samples), len(found.validation)) == (16, 4)
    scenes = {concept_prompt(scene, number): scene for number, scene in enumerate(concept_scenes())}
    trained = [scenes[sample.prompts[0]] for sample in found.samples]
    assert {scene.color for scene in trained} == set(COLORS)
    assert {scene.background for scene in trained} == set(COLORS)
    assert {scene.position for scene in trained} == set(POSITIONS)
    assert {scene.size for scene in trained} == set(SIZES)
