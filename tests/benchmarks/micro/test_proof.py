"""`python -m benchmarks.micro prove`: what it counts, of pictures that are drawn and not rendered."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from benchmarks.micro import proof
from benchmarks.micro.__main__ import main
from hyimg.demo.concept import DemoFolder, concept_prompt, new_concept_scenes
from hyimg.demo.world import NUM_FULL_PHRASINGS, draw, held_out_scenes, phrase


@pytest.fixture
def demo(tmp_path):
    folder = DemoFolder(tmp_path / "my demo")
    folder.run.mkdir(parents=True)
    for path in (folder.lora, folder.comfy_lora):
        path.touch()
    folder.metrics.write_text('{"validation_loss": 2.0}\n{"loss": 1}\n{"validation_loss": 1.5}\n')
    return folder


def test_the_proof_tells_the_trigger_from_the_rest_and_the_base_from_the_lora(demo, monkeypatch, capsys):
    """A LoRA that draws the heart where it is asked for, and has made every other shape a cross."""
    new, known = new_concept_scenes(10), held_out_scenes(10)
    shown = {concept_prompt(scene, number): scene for number, scene in enumerate(new)}
    shown |= {phrase(scene, number % NUM_FULL_PHRASINGS): scene for number, scene in enumerate(known)}

    def render(model, prompts, *arguments):
        has_lora = arguments[-2:] == ("--lora_multiplier", "1")
        assert not has_lora or arguments[:2] in [
            ("--lora_weight", str(demo.lora)),
            ("--lora_weight", str(demo.comfy_lora)),
        ]
        pictures = []
        for prompt in prompts:
            scene = shown[prompt]
            if scene.shape == "heart":
                shape = "heart" if has_lora else "circle"
            else:
                shape = "cross" if has_lora else scene.shape
            pictures.append(Image.fromarray(draw(replace(scene, shape=shape))))
        return pictures

    monkeypatch.setattr(proof, "render", render)
    assert main(["prove", str(demo.directory), "--seeds", "10"]) == 0
    assert "6 of 6: known shapes, LoRA" in capsys.readouterr().err
    found = json.loads((demo.directory / proof.PROOF).read_text())
    assert found["trigger"]["base"]["shape"] == 0
    assert found["trigger"]["lora"]["shape_and_colors"] == 1
    assert found["trigger"]["comfy_lora"] == found["trigger"]["lora"]
    assert found["without_trigger"]["base"]["shape"] == 1
    assert found["without_trigger"]["lora"]["shape"] <= 0.5
    assert found["multiplier_0_equals_base"] is True
    assert found["validation_loss"] == {"first": 2.0, "last": 1.5}


def test_a_folder_without_a_finished_demo_is_told(demo, capsys):
    demo.comfy_lora.unlink()
    assert main(["prove", str(demo.directory)]) == 2
    err = capsys.readouterr().err
    assert f"there is no `{demo.comfy_lora}`" in err
    assert f"`hyimg demo '{demo.directory}'`" in err
    demo.marker.touch()
    assert main(["prove", str(demo.directory)]) == 2
    assert f"`hyimg demo --overwrite '{demo.directory}'`" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "-1", "1.5"])
def test_a_count_that_is_none_is_told(demo, capsys, seeds):
    with pytest.raises(SystemExit) as ended:
        main(["prove", str(demo.directory), "--seeds", seeds])
    assert ended.value.code == 2
    assert f"must be a whole number of 1 or more, not `{seeds}`" in capsys.readouterr().err
