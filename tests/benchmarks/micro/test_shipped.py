"""The model that comes with the package: what it was measured to do, it does."""

from __future__ import annotations

import json

import pytest

from benchmarks.micro.build import MANIFEST
from benchmarks.micro.judge import (
    MEASURES,
    NUM_FIRST,
    NUM_FIRST_PICTURES,
    reconstruction_psnr,
    score,
    verdicts,
)
from benchmarks.micro.text_encoders import MICRO_DIT, MICRO_VAE
from hyimg.cache.hashing import file_identity
from hyimg.checkpoints.header_check import open_dit
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.demo.concept import WEIGHTS, concept_prompt, copy_micro_model, new_concept_scenes
from hyimg.demo.world import NUM_FULL_PHRASINGS, held_out_scenes, phrase
from hyimg.model.loading import check_vae

SHIPPED = ModelFolder(WEIGHTS)


@pytest.fixture(scope="module")
def measures() -> dict:
    return json.loads((WEIGHTS / MEASURES).read_text())


@pytest.fixture(scope="module")
def shown() -> dict:
    """Scenes and verdicts of pictures that one command has rendered: held-out prompts, and the demo's shape."""
    held_out, new = held_out_scenes(NUM_FIRST), new_concept_scenes(6)
    prompts = [phrase(scene, number % NUM_FULL_PHRASINGS) for number, scene in enumerate(held_out)]
    found = verdicts(SHIPPED, prompts + [concept_prompt(scene, number) for number, scene in enumerate(new)])
    return {"held out": (held_out, found[:NUM_FIRST]), "new": (new, found[NUM_FIRST:])}


def test_the_files_are_those_that_the_manifest_tells_of(tmp_path):
    files = json.loads((WEIGHTS / MANIFEST).read_text())["files"]
    copied = ModelFolder(tmp_path / "model")
    copy_micro_model(copied)
    assert sorted(files) == sorted(path.name for path in copied.directory.iterdir())
    for name, told in files.items():
        path = copied.directory / name
        assert (path.stat().st_size, file_identity(path)) == (told["bytes"], told["sha256"])
    assert open_dit(copied.dit).arch == MICRO_DIT
    assert check_vae(copied.vae) == MICRO_VAE
    assert sum(path.stat().st_size for path in copied.directory.iterdir()) < 20e6


def test_held_out_prompts_become_what_they_ask_for(measures, shown):
    """The first 20 of the 200 that were measured, with the same seeds: machines differ in rounding and precision."""
    scenes = shown["held out"][0]
    scores = score(*shown["held out"])
    measured = dict(measures["with_first_prompts"])
    assert measured.pop("prompts") == NUM_FIRST
    assert set(scores) == set(measured)
    for name, share in measured.items():
        num_pictures = sum((scene.letter is not None) == (name == "letter") for scene in scenes)
        of = num_pictures if "letter" in name else NUM_FIRST
        assert scores[name] >= share - 3 / of, name


def test_the_vae_gives_pictures_back_as_measured(measures):
    """In float32, whose rounding moves a value of 8 bits by one at most, and few of them: 0.1 dB is far more."""
    found = reconstruction_psnr(SHIPPED, held_out_scenes(NUM_FIRST_PICTURES))
    assert found == pytest.approx(measures["vae_psnr_first"], abs=0.1)


def test_the_shape_that_the_demo_teaches_is_not_there_before(shown):
    assert score(*shown["new"])["shape"] <= 0.2
