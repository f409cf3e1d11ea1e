"""`hyimg infer` and `hyimg sample`: pictures that repeat, LoRAs that act, files that say how they were made."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyimg.checkpoints.safetensors_file import Checkpoint
from hyimg.config.image_file import read_settings
from hyimg.rendering import loras, render_plan
from hyimg.stages import infer as stage

SIZE = ["--image_size", "64", "96", "--infer_steps", "3"]
QUICK = ["--image_size", "32", "32", "--infer_steps", "1", "--guidance_scale", "1"]
MODELS = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def infer(hyimg, tmp_path):
    """Renders "a red square" and gives the picture's path."""
    count = iter(range(100))

    def call(*extra):
        path = tmp_path / f"{next(count)}.png"
        prompt = [] if "--from_file" in extra else ["--prompt", "a red square", "--seed", "5"]
        code, _, err = hyimg("infer", *MODELS, *SIZE, *prompt, "--save_path", path, *extra)
        assert code == 0, err
        return path

    return call


def test_a_seed_gives_the_same_picture_and_another_seed_another(infer):
    first, again, other = infer(), infer(), infer("--seed", "6")
    assert pixels(first).shape == (64, 96, 3)
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(other))


def test_the_picture_says_how_it_was_made(infer, trained):
    lora = trained / "lora.safetensors"
    settings = read_settings(
        infer("--lora_weight", lora, "--lora_multiplier", "0.5", "--guidance_scale", "4")
    )
    assert settings["prompt"] == "a red square"
    assert (settings["width"], settings["height"], settings["infer_steps"]) == (96, 64, 3)
    assert (settings["guidance_scale"], settings["flow_shift"], settings["seed"]) == (4.0, 5.0, 5)
    assert settings["loras"][0]["file"] == "lora.safetensors"
    assert settings["loras"][0]["multiplier"] == 0.5
    assert read_settings(infer("--no_metadata")) is None


def test_a_lora_acts_by_its_multiplier_in_either_form(infer, trained):
    exact = ["--mixed_precision", "no"]
    base, lora = infer(*exact), infer(*exact, "--lora_weight", trained / "lora.safetensors")
    comfy = infer(*exact, "--lora_weight", trained / "comfy" / "lora.safetensors")
    none = infer(*exact, "--lora_weight", trained / "lora.safetensors", "--lora_multiplier", "0")
    assert not np.array_equal(pixels(base), pixels(lora))
    assert np.array_equal(pixels(lora), pixels(comfy))
    assert np.array_equal(pixels(base), pixels(none)), "multiplier 0 is the base model, bit for bit"
    halves = infer(
        *exact, "--lora_weight", *[trained / "lora.safetensors"] * 2, "--lora_multiplier", "0.5", "0.5"
    )
    # two halves add up to the whole, up to float32's rounding: a value of 8 bits may round to its neighbour
    difference = np.abs(pixels(halves).astype(int) - pixels(lora).astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    "extra",
    [
        ["--negative_prompt", "a cat"],
        ["--guidance_scale", "1"],
        ["--flow_shift", "3"],
        ["--sampler", "heun"],
        ["--sampler", "dpm++2m"],
        ["--guidance_rescale", "0.5"],
        ["--apg_start_step_general", "0"],
        ["--mixed_precision", "bf16"],
    ],
)
def test_options_change_the_picture(infer, extra):
    # in float32, where rounding does not change a picture; of 3 steps dpm++2m takes each as euler does
    base = ["--mixed_precision", "no", "--infer_steps", "6"]
    assert not np.array_equal(pixels(infer(*base)), pixels(infer(*base, *extra)))


def test_chunks_of_the_vae_change_no_more_than_rounding(infer):
    whole, chunked = pixels(infer()).astype(int), pixels(infer("--vae_chunk_size", "4")).astype(int)
    assert np.abs(whole - chunked).max() <= 1


def test_apg_starts_late_for_quoted_text(infer, tmp_path):
    quoted = ["--prompt", 'a sign "GO"']
    assert np.array_equal(pixels(infer(*quoted)), pixels(infer(*quoted, "--apg_start_step_general", "0")))
    assert not np.array_equal(pixels(infer(*quoted)), pixels(infer(*quoted, "--apg_start_step_ocr", "0")))


def test_a_prompt_file_renders_one_picture_a_line(infer, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# two\na cat --w 64 --h 32 --d 3\na dog --s 2 --l 2.5 --fs 3 --n fog\n", encoding="utf-8"
    )
    path = infer("--from_file", prompts)
    first, second = path.with_name("0-0001.png"), path.with_name("0-0002.png")
    assert pixels(first).shape == (32, 64, 3)
    settings = read_settings(second)
    assert (settings["prompt"], settings["negative_prompt"], settings["infer_steps"]) == ("a dog", "fog", 2)
    assert isinstance(settings["seed"], int), "a drawn seed is recorded"


def test_a_picture_that_is_there_is_not_replaced_unasked(hyimg, infer):
    path = infer()
    before = path.read_bytes()
    arguments = [*MODELS, *SIZE, "--prompt", "a cat", "--save_path", path]
    code, _, err = hyimg("infer", *arguments)
    assert code == 2
    assert "exists" in err
    assert path.read_bytes() == before
    assert hyimg("infer", *arguments, "--overwrite")[0] == 0
    assert path.read_bytes() != before


def test_saved_latents_decode_to_the_same_picture(hyimg, infer, tmp_path):
    picture = infer("--output_type", "latent_images")
    decoded = tmp_path / "decoded.png"
    latent = picture.with_suffix(".safetensors")
    code, _, err = hyimg("infer", "--vae", "{vae}", "--latent_path", latent, "--save_path", decoded)
    assert code == 0, err
    assert np.array_equal(pixels(picture), pixels(decoded))
    assert read_settings(decoded) == read_settings(picture)


def test_an_option_that_changes_nothing_is_told_and_a_small_model_has_no_native_sizes(hyimg, tmp_path):
    prompt = ["--prompt", "x", "--save_path", tmp_path / "a.png"]
    _, _, err = hyimg("infer", *MODELS, *SIZE, *prompt, "--split_attn")
    assert "is not one of the sizes" not in err
    assert "`--split_attn` has no effect" in err


def test_sample_makes_a_sheet_of_prompts_and_checkpoints(hyimg, tmp_path, trained):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a red square --d 5\na sign with the word "GO" --w 64 --d 6\n', encoding="utf-8")
    files = [trained / "lora-000001.safetensors", trained / "lora.safetensors"]
    arguments = [
        *MODELS,
        *SIZE,
        "--prompts",
        prompts,
        "--lora_weight",
        *files,
        "--output_dir",
        tmp_path / "out",
    ]
    code, _, err = hyimg("sample", *arguments)
    assert code == 0, err
    images = {p.name for p in (tmp_path / "out").iterdir()}
    labels = ["base", "lora-000001", "lora"]
    assert images == {f"{row:03}-{label}.png" for row in (1, 2) for label in labels} | {"sheet.png"}
    base, last = (pixels(tmp_path / "out" / f"001-{label}.png") for label in ("base", "lora"))
    assert not np.array_equal(base, last)
    sheet = Image.open(tmp_path / "out" / "sheet.png")
    assert sheet.width >= 3 * 96
    assert sheet.height >= 2 * 64


def test_sample_and_infer_render_alike(hyimg, infer, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --d 5\n", encoding="utf-8")
    code, _, err = hyimg("sample", *MODELS, *SIZE, "--prompts", prompts, "--output_dir", tmp_path / "out")
    assert code == 0, err
    assert np.array_equal(pixels(tmp_path / "out" / "001-base.png"), pixels(infer()))


def test_sample_takes_prompts_from_the_text_cache(hyimg, cached_dataset, infer, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --d 5\n", encoding="utf-8")
    arguments = [
        "--dit",
        "{dit}",
        "--vae",
        "{vae}",
        *SIZE,
        "--prompts",
        prompts,
        "--output_dir",
        tmp_path / "out",
    ]
    cache = cached_dataset.parent / "hyimg-cache"
    code, _, err = hyimg("sample", *arguments, "--cache_dir", cache)
    assert code == 0, err
    assert np.array_equal(pixels(tmp_path / "out" / "001-base.png"), pixels(infer()))
    prompts.write_text("a prompt that nobody cached\n", encoding="utf-8")
    code, _, err = hyimg("sample", *arguments, "--cache_dir", cache)
    assert code == 2
    assert "no text cache for the prompt `a prompt that nobody cached`" in err


def test_a_file_keeps_the_spelling_that_was_given(hyimg, tmp_path):
    arguments = [*MODELS, *QUICK, "--prompt", "x", "--save_path", tmp_path / "v1.5.PNG"]
    code, _, err = hyimg("infer", *arguments, "--output_type", "latent_images")
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"v1.5.PNG", "v1.5.safetensors"}


def test_a_folder_is_filled_up_after_its_highest_number(hyimg, tmp_path):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    folder.mkdir()
    for name in ("0001.png", "0003.SAFETENSORS", "notes-0009.png"):
        (folder / name).write_bytes(b"mine")
    code, _, err = hyimg("infer", *MODELS, *QUICK, "--from_file", prompts, "--save_path", folder)
    assert code == 0, err
    mine = {path.name for path in folder.iterdir() if path.read_bytes() == b"mine"}
    assert mine == {"0001.png", "0003.SAFETENSORS", "notes-0009.png"}
    assert {path.name for path in folder.iterdir()} - mine == {"0004.png", "0005.png"}
    assert read_settings(folder / "0005.png")["prompt"] == "a dog"


@pytest.mark.parametrize("output_type", ["images", "latent_images"])
def test_two_runs_at_once_take_nothing_from_each_other(hyimg, tmp_path, monkeypatch, output_type):
    folder = tmp_path / "out"
    encode = stage.encode_states

    def meanwhile(*arguments):
        """What another run leaves after this one has looked for free numbers."""
        folder.mkdir()
        (folder / "0001.png").write_bytes(b"mine")
        return encode(*arguments)

    monkeypatch.setattr(stage, "encode_states", meanwhile)
    arguments = [*MODELS, *QUICK, "--prompt", "x", "--save_path", folder, "--output_type", output_type]
    code, _, err = hyimg("infer", *arguments)
    assert code == 0, err
    assert (folder / "0001.png").read_bytes() == b"mine"
    assert read_settings(folder / "0002.png")["prompt"] == "x"
    assert f"saved {folder / '0002.png'}" in err


def test_no_metadata_holds_for_latents_and_what_is_decoded_from_them(hyimg, infer, tmp_path):
    latent = infer("--output_type", "latent", "--no_metadata").with_suffix(".safetensors")
    with safe_open(latent, "pt") as file:
        assert not file.metadata()
    decoded = tmp_path / "decoded.png"
    code, _, err = hyimg("infer", "--vae", "{vae}", "--latent_path", latent, "--save_path", decoded)
    assert code == 0, err
    assert read_settings(decoded) is None


def test_no_model_file_is_mapped_where_that_is_forbidden(hyimg, tmp_path, monkeypatch):
    def mapped(self, path):
        raise AssertionError(f"{path} was mapped")

    monkeypatch.setattr(Checkpoint, "_map", mapped)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign "GO"\n', encoding="utf-8")
    common = [*MODELS, *QUICK, "--disable_mmap_load_safetensors"]
    code, _, err = hyimg("infer", *common, "--from_file", prompts, "--save_path", tmp_path / "a.png")
    assert code == 0, err
    code, _, err = hyimg("sample", *common, "--prompts", prompts, "--output_dir", tmp_path / "out")
    assert code == 0, err


@pytest.mark.parametrize(
    "given",
    [
        ["--prompt", "x"],
        ["--negative_prompt", "x"],
        ["--from_file", __file__],
        ["--lora_weight", "{vae}"],
        ["--lora_multiplier", "0.5"],
        ["--seed", "0"],
        ["--infer_steps", "3", "--sampler", "heun"],
        ["--guidance_rescale", "0.5"],
    ],
)
def test_latents_that_are_rendered_take_no_options_of_rendering(hyimg, tmp_path, given):
    target = tmp_path / "a.png"
    code, _, err = hyimg("infer", "--vae", "{vae}", "--latent_path", __file__, "--save_path", target, *given)
    assert code == 2
    options = ", ".join(f"`{option}`" for option in given if option.startswith("--"))
    assert f"`--latent_path` decodes latents that are rendered already and takes no {options}" in err


@pytest.mark.parametrize(
    ("latent", "metadata", "words"),
    [
        (torch.zeros(1, 3, 2, 2), {}, "has 3 channels, and the VAE's have 16"),
        (torch.full((1, 16, 2, 2), math.nan), {}, "is not finite"),
        (torch.zeros(1, 16, 0, 2), {}, "holds no latent"),
        (torch.zeros(1, 16, 2, 2), {"hyimg": "{"}, "`hyimg` in the metadata"),
        (torch.zeros(1, 16, 2, 2), {"hyimg": "[1]"}, "`hyimg` in the metadata"),
    ],
)
def test_a_latent_that_cannot_be_decoded_is_refused_before(
    hyimg, tmp_path, monkeypatch, latent, metadata, words
):
    monkeypatch.setattr(render_plan, "load_vae", None)
    path, target = tmp_path / "bad.safetensors", tmp_path / "a.png"
    save_file({"latent": latent}, path, metadata=metadata)
    code, _, err = hyimg("infer", "--vae", "{vae}", "--latent_path", path, "--save_path", target)
    assert code == 2
    assert words in err
    assert "bad.safetensors" in err
    assert not target.exists()


def test_numbers_that_run_away_leave_no_picture(hyimg, tmp_path, trained):
    lora, target = trained / "lora.safetensors", tmp_path / "a.png"
    arguments = [*MODELS, *QUICK, "--prompt", "x", "--save_path", target, "--output_type", "latent_images"]
    code, _, err = hyimg("infer", *arguments, "--lora_weight", lora, "--lora_multiplier", "1e38")
    assert code == 1
    assert "error: the latent is not finite" in err
    broken = tmp_path / "broken.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(lora).items()}, broken)
    code, _, err = hyimg("infer", *arguments, "--lora_weight", broken)
    assert code == 2
    assert "broken.safetensors` holds NaN or infinity" in err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def test_sample_takes_any_prompt_and_says_what_it_does(hyimg, tmp_path, trained, monkeypatch):
    hashed = []
    identity = loras.file_identity
    monkeypatch.setattr(loras, "file_identity", lambda path: hashed.append(path.name) or identity(path))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": "two\nlines"}, "a dog --w 64 --h 32"]), encoding="utf-8")
    arguments = [*MODELS, *QUICK, "--prompts", prompts, "--lora_weight", trained / "lora.safetensors"]
    code, _, err = hyimg("sample", *arguments, "--output_dir", tmp_path / "out")
    assert code == 0, err
    assert hashed == ["lora.safetensors"], "once a file, not once an image"
    assert "32 of 32 modules, multiplier 1" in err
    settings = read_settings(tmp_path / "out" / "001-lora.png")
    assert settings["prompt"] == "two\nlines"
    assert settings["loras"][0]["sha256"]
    assert read_settings(tmp_path / "out" / "001-base.png")["loras"] == []


def test_encoders_choose_among_the_text_caches(hyimg, cached_dataset, tmp_path, model):
    prompts, other = tmp_path / "prompts.txt", tmp_path / "other.safetensors"
    prompts.write_text("a red square\n", encoding="utf-8")
    data = bytearray(model.text_encoder.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    cache = cached_dataset.parent / "hyimg-cache"
    common = ["--dit", "{dit}", "--vae", "{vae}", "--byt5", "{byt5}", *QUICK, "--prompts", prompts]
    common += ["--cache_dir", cache, "--tokenizer", model.directory, "--output_dir", tmp_path / "out"]
    code, _, err = hyimg("sample", *common, "--text_encoder", other)
    assert code == 2
    assert "no text cache for" in err
    code, _, err = hyimg("sample", *common, "--text_encoder", "{text_encoder}")
    assert code == 0, err
