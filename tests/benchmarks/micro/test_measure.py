"""The measures count what the judge finds, and come from the real command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks.micro import judge as measuring
from benchmarks.micro.__main__ import main
from benchmarks.micro.judge import FLAGS, MEASURES, judge, reconstruction_psnr, score, verdicts
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.demo.world import draw, held_out_scenes
from hyimg.errors import RunError
from hyimg.model.vae import Posterior


def test_scores_are_shares_of_what_is_right():
    scenes = held_out_scenes(20)
    found = [judge(Image.fromarray(draw(scene))) for scene in scenes]
    assert set(score(scenes, found).values()) == {1.0}
    other = replace(scenes[0], shape="heart", letter=None)
    found[0] = judge(Image.fromarray(draw(other)))
    scores = score(scenes, found)
    assert (scores["shape"], scores["shape_and_colors"], scores["all"]) == (0.95, 0.95, 0.95)
    assert (scores["color"], scores["position"]) == (1.0, 1.0)
    turned = score(scenes, [*found[1:], found[0]])
    assert turned["all"] < 0.2
    assert turned["shape_and_colors"] < 0.2


def test_letters_are_scored_where_they_are_asked_for_and_where_not():
    plain = replace(held_out_scenes(1)[0], letter=None)
    asked = replace(plain, letter="A")
    with_letter, without = (judge(Image.fromarray(draw(scene))) for scene in (asked, plain))
    scores = score([asked, asked, plain, plain], [with_letter, without, with_letter, without])
    assert (scores["letter"], scores["no_letter_unasked"]) == (0.5, 0.5)


def test_pictures_come_from_the_real_command(micro):
    found = verdicts(micro, ["a small red circle", ""], "--infer_steps", "1")
    assert len(found) == 2


def test_a_command_that_fails_is_told(micro, tmp_path):
    with pytest.raises(RunError, match="hyimg infer"):
        verdicts(ModelFolder(tmp_path), ["a circle"])


def test_a_folder_without_a_model_is_told_before_anything_is_rendered(tmp_path, capfd):
    assert main(["measure", str(tmp_path / "none"), "--prompts", "1"]) == 2
    err = capfd.readouterr().err
    assert f"there is no `{tmp_path / 'none'}" in err
    assert "infer" not in err


def test_psnr_is_of_what_the_decoder_gives(micro, monkeypatch):
    class Shifted:
        """Gives every picture back 10 of 255 levels off."""

        def encode(self, image_BCHW):
            return Posterior(image_BCHW, image_BCHW)

        def parameters(self):
            return iter([torch.zeros(1)])

        def decode(self, latent_BCHW):
            levels = (latent_BCHW + 1) * 127.5
            return torch.where(levels < 128, levels + 10, levels - 10) / 127.5 - 1

    monkeypatch.setattr(measuring, "load_vae", lambda path, **options: Shifted())
    assert reconstruction_psnr(micro, held_out_scenes(3)) == pytest.approx(28.13, abs=0.02)


@pytest.mark.long
def test_measures_are_written(micro, capsys):
    flags = ["--prompts", "2", "--vae_pictures", "2", "--infer", "--infer_steps 2"]
    assert main(["measure", str(micro.directory), *flags]) == 0
    measures = json.loads((micro.directory / MEASURES).read_text())
    assert measures["infer_arguments"] == [*FLAGS, "--infer_steps", "2"]
    assert measures["prompts"] == 2
    assert set(measures["with_prompt"]) == set(measures["prompt_emptied"])
    assert measures["vae_psnr"] == measures["vae_psnr_first"] > 0


def test_errors_are_sentences(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    assert main(["build", str(tmp_path)]) == 2
    assert "no earlier build" in capsys.readouterr().err
