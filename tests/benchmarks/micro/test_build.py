"""`python -m benchmarks.micro build`: files that the real commands take, and builds that go on where they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.micro import dit
from benchmarks.micro.build import MANIFEST, PICTURES, RECIPE, WORK, build
from benchmarks.micro.dit import PICTURE_SEED, DiTLoss, EncodedPictures, Fitting, make_dit
from benchmarks.micro.recipe import Fit
from benchmarks.micro.text_encoders import MICRO_DIT, MICRO_QWEN, MICRO_VAE, open_text_encoders
from benchmarks.micro.vae import VAELoss, _focus, make_vae, to_image, vae_loss
from hyimg.cache.hashing import file_identity
from hyimg.checkpoints.header_check import open_dit
from hyimg.cli.app import run
from hyimg.demo.world import NUM_FULL_PHRASINGS, Scene, draw, phrase, training_scene
from hyimg.errors import HyimgError, RunError
from hyimg.model.loading import check_vae
from hyimg.report import SilentReporter


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for p in folder.glob("*")
        if p.suffix == ".safetensors" or p.name == "tokenizer.json"
    }


# ---- what is built


def test_the_files_have_the_micro_sizes_and_a_manifest_that_tells_how_they_were_made(micro, short):
    assert open_dit(micro.dit).arch == MICRO_DIT
    assert check_vae(micro.vae) == MICRO_VAE
    assert sum(path.stat().st_size for path in micro.files().values()) < 20e6
    manifest = json.loads((micro.directory / MANIFEST).read_text())
    assert manifest["recipe"] == json.loads(json.dumps(asdict(short)))
    for path in (*micro.files().values(), micro.tokenizer):
        assert manifest["files"][path.name] == {"bytes": path.stat().st_size, "sha256": file_identity(path)}
    for name in ("vae", "dit"):
        (line,) = (micro.directory / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == 2


def test_the_real_commands_take_the_files(micro, tmp_path, capfd):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        scene = training_scene(4, number)
        Image.fromarray(draw(scene, 4, number)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f'a {scene.color} {scene.shape} and the text "A"')
    dataset = tmp_path / "data.toml"
    dataset.write_text(
        "[general]\nresolution = 128\nbatch_size = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\n"
    )
    given = {option: ["--" + option, str(path)] for option, path in micro.files().items()}
    texts = [*given["text_encoder"], *given["byt5"]]
    assert run(["cache-latents", "--dataset_config", str(dataset), *given["vae"]]) == 0
    assert run(["cache-text", "--dataset_config", str(dataset), *texts]) == 0
    train = ["train", *given["dit"], "--dataset_config", str(dataset), "--output_dir", str(tmp_path / "run")]
    assert run([*train, "--max_train_steps", "2", "--network_dim", "2"]) == 0
    picture = tmp_path / "a.png"
    infer = ["infer", *(word for words in given.values() for word in words), "--save_path", str(picture)]
    lora = ["--lora_weight", str(tmp_path / "run" / "lora.safetensors")]
    asked = [
        "--prompt",
        'a red circle with the letter "A"',
        "--image_size",
        "128",
        "128",
        "--infer_steps",
        "3",
    ]
    assert run([*infer, *asked, *lora]) == 0, capfd.readouterr().err
    assert Image.open(picture).size == (128, 128)


# ---- going on


@pytest.mark.parametrize("model", ["vae", "dit"])
def test_a_fit_that_is_resumed_ends_in_the_same_bits(model, micro, first_vae, short, tmp_path, monkeypatch):
    monkeypatch.setattr(dit, "LOG_EVERY", 1)
    images = VAELoss.images
    monkeypatch.setattr(VAELoss, "images", lambda self, step: images(self, step)[..., :64, :64])

    def fit(folder: Path) -> Fitting:
        if model == "vae":
            module = first_vae()
            loss = VAELoss(module, short)
        else:
            module = make_dit(0)
            pictures = EncodedPictures.load(micro.directory / WORK / PICTURES)
            loss = DiTLoss(module, pictures, open_text_encoders(micro), short)
        settings = getattr(short, model)
        return Fitting(
            model, module, settings, loss, folder=folder, log_path=folder / "log", report=SilentReporter()
        )

    whole, first = fit(tmp_path / "whole"), fit(tmp_path / "parts")
    whole.run()
    first.run(stop_after=1)
    with (tmp_path / "parts" / "log").open("a") as log:
        log.write("lines after the state are dropped\n")
    second = fit(tmp_path / "parts")
    second.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log").read_text().splitlines()]
        for n in ("whole", "parts")
    ]
    for line in (*logs[0], *logs[1]):
        del line["seconds_a_step"]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2]


@pytest.mark.long
def test_a_build_that_is_killed_goes_on_to_the_same_files(tmp_path):
    steps = [
        "--vae_steps",
        "4",
        "--vae_batch_size",
        "1",
        "--pictures",
        "6",
        "--dit_steps",
        "6",
        "--dit_batch_size",
        "4",
    ]

    def command(name):
        script = (
            "import sys; from benchmarks.micro import dit; dit.SAVE_EVERY = 2\n"
            "from benchmarks.micro.__main__ import main; sys.exit(main())"
        )
        return [
            sys.executable,
            "-c",
            script,
            "build",
            str(tmp_path / name),
            "--resume",
            "--threads",
            "1",
            *steps,
        ]

    subprocess.run(command("whole"), check=True)
    for state in ("vae-state", "dit-state"):
        process = subprocess.Popen(command("killed"))
        while not (tmp_path / "killed" / WORK / state / "manifest.json").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command("killed"), check=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_finished_build_is_left_as_it_is(micro, short):
    before = files(micro.directory)
    build(micro.directory, short, SilentReporter(), resume=True)
    assert files(micro.directory) == before


def test_what_is_there_is_not_touched(micro, short, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(HyimgError, match="no earlier build"):
        build(other, short, SilentReporter(), resume=True)
    assert [p.name for p in other.iterdir()] == ["letter.txt"]
    with pytest.raises(HyimgError, match="holds a build"):
        build(micro.directory, short, SilentReporter())
    with pytest.raises(HyimgError, match="another recipe"):
        build(micro.directory, replace(short, seed=1), SilentReporter(), resume=True)


def test_a_damaged_recipe_is_told(micro, short, tmp_path):
    shutil.copytree(micro.directory, tmp_path / "copy")
    (tmp_path / "copy" / RECIPE).write_text("{")
    with pytest.raises(HyimgError, match="another recipe"):
        build(tmp_path / "copy", short, SilentReporter(), resume=True)


def test_a_loss_that_is_not_finite_ends_the_fit(tmp_path):
    model = torch.nn.Linear(1, 1)
    fit = Fit(steps=3, batch_size=1, learning_rate=1.0)
    one = Fitting(
        "line",
        model,
        fit,
        lambda step: (model.weight.sum() * float("nan"), {}),
        folder=tmp_path,
        log_path=tmp_path / "log",
        report=SilentReporter(),
    )
    with pytest.raises(RunError, match="step 1"):
        one.run()


# ---- what is learnt from


@pytest.mark.parametrize("phrasing", range(NUM_FULL_PHRASINGS + 1))
@pytest.mark.parametrize("colors", [("red", "blue"), ("green", "white"), ("black", "purple")])
def test_text_states_tell_colours_that_changed_places(micro, colors, phrasing):
    """The DiT gives text no positions: what stood before a word must be in the word's own state.

    A random transformer without look-back weights comes to 0.16 in the worst of these.
    """
    scenes = [Scene("circle", *pair, "on the left", "small") for pair in (colors, colors[::-1])]
    encoded = open_text_encoders(micro).encode([phrase(scene, phrasing) for scene in scenes])
    one_TD, other_TD = (text.text_TD.float() for text in encoded)
    to_nearest_T = torch.cdist(one_TD, other_TD).amin(1)
    assert to_nearest_T.max() > 0.6 * one_TD.norm(dim=1).mean()


def test_heads_look_back_a_fixed_number_of_tokens(micro):
    """A word changes the states of the eight words after it in the first layer, and of no earlier one."""
    encoders = open_text_encoders(micro)
    base, changed = (
        encoders.encode([f"a small {color} circle on the left, blue background"])[0].text_TD.float()
        for color in ("red", "green")
    )
    apart_T = (base - changed).norm(dim=1) / base.norm(dim=1)
    assert apart_T[:2].max() == 0
    assert apart_T[2] > 0.5
    assert apart_T[3] > 0.15
    assert MICRO_QWEN.num_heads == 8


def test_the_vae_loss_asks_for_the_picture_and_for_unit_latents(first_vae):
    vae = first_vae()
    image_BCHW = to_image([(0, 0), (0, 1)])[..., :64, :64]
    loss, details = vae_loss(vae, image_BCHW, 0, 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())
    assert details["l1"] > 0


def test_shapes_and_letters_count_four_times_in_the_vae_loss():
    scene = Scene("circle", "red", "blue", "in the middle", "small")
    image_BCHW = torch.from_numpy(draw(scene)).permute(2, 0, 1)[None].float() / 127.5 - 1
    weight_B1HW = _focus(image_BCHW)
    assert weight_B1HW.mean() == pytest.approx(1, abs=1e-5)
    middle, rim, background = (
        weight_B1HW[0, 0, 64, 64],
        weight_B1HW[0, 0, 64, 64 - 22],
        weight_B1HW[0, 0, 0, 0],
    )
    assert middle == rim
    assert middle / background == pytest.approx(4)
    assert weight_B1HW[0, 0, 64, 64 - 26] == background
    assert torch.equal(_focus(image_BCHW[..., :20, :20]), torch.ones(1, 1, 20, 20))


def test_the_vae_is_shown_new_pictures_in_every_step(first_vae, short):
    loss = VAELoss(first_vae(), replace(short, vae=replace(short.vae, batch_size=2)))
    first, second = loss.images(0), loss.images(1)
    assert first.shape == (2, 3, 128, 128)
    assert torch.equal(first, loss.images(0))
    pictures = torch.cat([first, second])
    assert len({picture.numpy().tobytes() for picture in pictures}) == 4


def test_the_vae_begins_as_a_codec_of_pictures_that_it_was_not_made_from(short):
    """Random weights give about 5 dB, and a colour that is the same everywhere 9."""
    vae = make_vae(replace(short, vae_start_pictures=8))
    image_BCHW = to_image([(7, number) for number in range(6)])
    with torch.no_grad():
        latent_BCHW = vae.encode(image_BCHW).mean_BCHW
        error = (vae.decode(latent_BCHW).clamp(-1, 1) - image_BCHW).square().mean()
    assert -10 * torch.log10(error / 4) > 18
    assert 0.7 < latent_BCHW.std() < 1.5


def test_a_step_has_captions_of_one_phrasing_with_or_without_letters_or_none_at_all(micro, short):
    pictures = EncodedPictures.load(micro.directory / WORK / PICTURES)
    recipe = replace(short, caption_dropout=0.25, dit=replace(short.dit, batch_size=3))
    loss = DiTLoss(make_dit(0), pictures, open_text_encoders(micro), recipe)
    steps = [loss.batch(step) for step in range(60)]
    again = loss.batch(3)
    assert again.prompts == steps[3].prompts
    assert torch.equal(again.mean_BCHW, steps[3].mean_BCHW)
    empty = [set(batch.prompts) == {""} for batch in steps]
    assert 5 <= sum(empty) <= 27
    told = [batch for batch, is_empty in zip(steps, empty, strict=True) if not is_empty]
    for batch in told:
        assert len({len(text_TD) for text_TD, _ in batch.text}) == 1
        for key, prompt, mean_CHW in zip(batch.sample_keys, batch.prompts, batch.mean_BCHW, strict=True):
            scene = training_scene(PICTURE_SEED, int(key))
            assert f"{scene.color} {scene.shape}" in prompt
            assert (scene.letter is not None) == ('"' in prompt)
            assert torch.equal(mean_CHW, pictures.mean_NCHW[int(key)])
    assert len({"background with" in batch.prompts[0] for batch in told}) == 2
    assert len({'"' in batch.prompts[0] for batch in told}) == 2


def test_pictures_of_the_set_are_those_that_their_captions_tell_of(micro):
    mean = load_file(micro.directory / WORK / PICTURES)["mean"]
    assert mean.shape == (6, MICRO_VAE.latent_channels, 4, 4)
    assert np.isfinite(mean.numpy()).all()
