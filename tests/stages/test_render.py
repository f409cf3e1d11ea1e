"""`hyimg infer` and `hyimg sample`: pictures that repeat, LoRAs that act, files that say how they were made."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hyimg.flow.pictures import read_settings

SIZE = ["--image_size", "64", "96", "--infer_steps", "3"]
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
    base, lora = infer(), infer("--lora_weight", trained / "lora.safetensors")
    comfy = infer("--lora_weight", trained / "comfy" / "lora.safetensors")
    none = infer("--lora_weight", trained / "lora.safetensors", "--lora_multiplier", "0")
    assert not np.array_equal(pixels(base), pixels(lora))
    assert np.array_equal(pixels(lora), pixels(comfy))
    assert np.array_equal(pixels(base), pixels(none)), "multiplier 0 is the base model, bit for bit"
    halves = infer("--lora_weight", *[trained / "lora.safetensors"] * 2, "--lora_multiplier", "0.5")
    # two halves add up to the whole, up to the rounding of bf16 activations
    difference = np.abs(pixels(halves).astype(int) - pixels(lora).astype(int))
    assert np.median(difference) <= 3


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
        ["--mixed_precision", "no"],
    ],
)
def test_options_change_the_picture(infer, extra):
    assert not np.array_equal(pixels(infer()), pixels(infer(*extra)))


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


def test_a_size_that_is_not_native_is_rendered_with_a_warning(hyimg, tmp_path):
    prompt = ["--prompt", "x", "--save_path", tmp_path / "a.png"]
    _, _, err = hyimg("infer", *MODELS, *SIZE, *prompt, "--split_attn")
    assert "warning: 96x64 (width x height) is not one of the sizes that the model was made for" in err
    assert "`--split_attn` changes nothing" in err


def test_sample_makes_a_sheet_of_prompts_and_checkpoints(hyimg, tmp_path, trained):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a red square --d 5\na sign with the word "GO" --w 64 --d 6\n', encoding="utf-8")
    loras = [trained / "lora-000001.safetensors", trained / "lora.safetensors"]
    arguments = [
        *MODELS,
        *SIZE,
        "--prompts",
        prompts,
        "--lora_weight",
        *loras,
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
