"""The model that comes with the package: what it was measured to do, it does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hyimg.cache.identity import file_identity
from hyimg.micro.architectures import MICRO_DIT, MICRO_VAE
from hyimg.micro.build import MANIFEST
from hyimg.micro.concept import concept_prompt, new_concept_scenes
from hyimg.micro.measure import MEASURES, NUM_FIRST, reconstruction_psnr, score, verdicts
from hyimg.micro.shipped import WEIGHTS, copy_micro_model
from hyimg.micro.world import NUM_FULL_PHRASINGS, held_out_scenes, phrase
from hyimg.model.folder import ModelFolder
from hyimg.model.loading import check_dit, check_vae

SHIPPED = ModelFolder(WEIGHTS)


@pytest.fixture(scope="module")
def measures() -> dict:
    return json.loads((WEIGHTS / MEASURES).read_text())


def test_the_files_are_those_that_the_manifest_tells_of(tmp_path):
    files = json.loads((WEIGHTS / MANIFEST).read_text())["files"]
    copied = ModelFolder(tmp_path / "model")
    copy_micro_model(copied)
    assert sorted(files) == sorted(path.name for path in copied.directory.iterdir())
    for name, told in files.items():
        path = copied.directory / name
        assert (path.stat().st_size, file_identity(path)) == (told["bytes"], told["sha256"])
    assert check_dit(copied.dit) == MICRO_DIT
    assert check_vae(copied.vae) == MICRO_VAE
    assert sum(path.stat().st_size for path in copied.directory.iterdir()) < 20e6


def test_held_out_prompts_become_what_they_ask_for(measures):
    """The first 40 of the 200 that were measured, with the same seeds: machines differ in rounding only."""
    scenes = held_out_scenes(NUM_FIRST)
    prompts = [phrase(scene, number % NUM_FULL_PHRASINGS) for number, scene in enumerate(scenes)]
    scores = score(scenes, verdicts(SHIPPED, prompts))
    measured = measures["with_first_prompts"]
    assert measured.pop("prompts") == NUM_FIRST
    assert set(scores) == set(measured)
    for name, share in measured.items():
        num_pictures = sum((scene.letter is not None) == (name == "letter") for scene in scenes)
        of = num_pictures if "letter" in name else NUM_FIRST
        assert scores[name] >= share - 3 / of, name


def test_the_vae_gives_pictures_back_as_measured(measures):
    assert reconstruction_psnr(SHIPPED, held_out_scenes(200)) == pytest.approx(measures["vae_psnr"], abs=0.3)


def test_the_shape_that_the_demo_teaches_is_not_there_before():
    scenes = new_concept_scenes(16)
    prompts = [concept_prompt(scene, number) for number, scene in enumerate(scenes)]
    assert score(scenes, verdicts(SHIPPED, prompts))["shape"] <= 0.2


@pytest.mark.long
def test_a_wheel_holds_the_model(tmp_path):
    source = Path(__file__).parents[2]
    tree = tmp_path / "source"
    for name in ("hyimg", "pyproject.toml", "README.md", "LICENSE"):
        path = source / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, tree / name, ignore=ignore) if path.is_dir() else shutil.copy(path, tree / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (wheel,) = tree.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (*json.loads((WEIGHTS / MANIFEST).read_text())["files"], MANIFEST, MEASURES):
        assert f"hyimg/micro/weights/{name}" in names
