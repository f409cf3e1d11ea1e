"""`hyimg infer` beyond one prompt: parts of LoRAs, merged models, pictures repeated, sessions, distilled models."""

from __future__ import annotations

import gc
import io
import json
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.config.image_file import read_settings
from hyimg.config.rendering import NO_APG
from hyimg.encoders import qwen
from hyimg.lora.files.formats import lora_name
from hyimg.memory.dit_loader import DiTSetup
from hyimg.model.dit import DiT
from hyimg.model.loading import init_random
from hyimg.rendering import interactive, render_plan
from hyimg.stages import infer as stage

MODELS = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
SIZE = ["--image_size", "64", "96", "--infer_steps", "3"]


def pixels(path):
    return np.asarray(Image.open(path))


def latent(path):
    return load_file(path.with_suffix(".safetensors"))["latent"]


@pytest.fixture
def infer(hyimg, tmp_path):
    """Renders "a red square" to a picture and a latent, and gives the picture's path and what was said."""
    count = iter(range(100))

    def call(*extra, models=MODELS, size=SIZE):
        path = tmp_path / f"{next(count)}.png"
        brings_prompts = {"--from_file", "--from_image"} & set(extra)
        prompt = [] if brings_prompts else ["--prompt", "a red square", "--seed", "5"]
        output = ["--output_type", "latent_images", "--save_path", path]
        code, _, err = hyimg("infer", *models, *size, *prompt, *output, *extra)
        assert code == 0, err
        return path, err

    return call


@pytest.fixture
def calls(monkeypatch):
    """The batch size of every call of the DiT."""
    sizes = []
    forward = DiT.forward

    def counted(self, latent_BCHW, *arguments, **named):
        sizes.append(len(latent_BCHW))
        return forward(self, latent_BCHW, *arguments, **named)

    monkeypatch.setattr(DiT, "forward", counted)
    return sizes


def test_the_preset_of_comfyui_is_what_its_options_are(infer):
    eight = [*SIZE[:3], "--infer_steps", "8"]
    preset, said = infer("--preset", "comfyui", size=eight)
    assert "preset comfyui: sampler euler, shift 5, guidance 3.5, no APG\n" in said
    never = ["--apg_start_step_general", "100", "--apg_start_step_ocr", "100"]
    by_hand, _ = infer(*never, size=eight)
    assert torch.equal(latent(preset), latent(by_hand))
    settings = read_settings(preset)
    assert settings["apg_start_step_general"] == settings["apg_start_step_ocr"] == NO_APG
    plain, said = infer(size=eight)
    assert "preset comfyui" not in said
    assert not torch.equal(latent(preset), latent(plain)), "APG is on by default"
    again, _ = infer("--from_image", preset, size=[])
    assert torch.equal(latent(again), latent(preset))
    _, said = infer("--preset", "comfyui", "--apg_start_step_general", "1", "--guidance_scale", "2")
    assert "guidance 2, APG after step 1; at 3 steps ComfyUI's noise levels differ a little" in said


# Parts of LoRAs


def test_patterns_choose_the_modules_of_each_lora(infer, trained, tmp_path):
    lora = trained / "lora.safetensors"
    state = load_file(lora)
    single = {name: tensor for name, tensor in state.items() if "single_blocks" in name}
    save_file(single, tmp_path / "single.safetensors")
    save_file({n: t for n, t in state.items() if n not in single}, tmp_path / "double.safetensors")
    both = [tmp_path / "single.safetensors", tmp_path / "double.safetensors"]

    included, said = infer(
        "--lora_weight", lora, lora, "--include_patterns", "single_blocks", "double_blocks"
    )
    by_hand, _ = infer("--lora_weight", *both)
    assert np.array_equal(pixels(included), pixels(by_hand))
    assert "20 of 32 modules" in said
    assert "12 of 32 modules" in said
    # a dotted name counts as a LoRA name does, and an empty pattern lets all through
    excluded, _ = infer("--lora_weight", lora, both[0], "--exclude_patterns", r"double_blocks\.\d+\.", "")
    twice, _ = infer("--lora_weight", both[0], both[0])
    assert np.array_equal(pixels(excluded), pixels(twice))
    whole, _ = infer("--lora_weight", lora)
    assert not np.array_equal(pixels(included), pixels(excluded))
    assert not np.array_equal(pixels(whole), pixels(excluded))
    record = read_settings(included)["loras"][1]
    assert record["include_pattern"] == "double_blocks"


# Merged models


def test_a_merged_lora_is_the_live_one(infer, trained):
    loras = ["--lora_weight", trained / "lora.safetensors", trained / "lora-000001.safetensors"]
    loras += ["--lora_multiplier", "0.7", "-0.4", "--exclude_patterns", "txt_", "", "--mixed_precision", "no"]
    base, _ = infer("--mixed_precision", "no")
    live, _ = infer(*loras)
    merged, said = infer(*loras, "--lora_mode", "merge")
    # float32 rounds the sum of two products in another order; guidance multiplies that by 10
    torch.testing.assert_close(latent(merged), latent(live), atol=1e-3, rtol=0)
    assert (latent(live) - latent(base)).abs().max() > 0.1
    assert "merging" in said


def test_a_merged_model_is_a_checkpoint_like_its_source(hyimg, infer, trained, tmp_path, model):
    source = tmp_path / "source.safetensors"
    save_file(load_file(model.dit), source, metadata={"who": "me"})
    path = tmp_path / "out" / "merged.safetensors"
    loras = ["--lora_weight", trained / "lora.safetensors", "--lora_multiplier", "0.5"]
    code, out, err = hyimg("infer", "--dit", source, *loras, "--save_merged_model", path)
    assert code == 0, err
    assert out == ""
    with safe_open(path, "pt") as file, safe_open(source, "pt") as before:
        assert set(file.keys()) == set(before.keys())
        metadata = file.metadata()
    assert metadata["who"] == "me"
    assert json.loads(metadata["hyimg_merged_loras"])[0]["multiplier"] == 0.5
    merged, base = load_file(path), load_file(source)
    assert all(merged[name].dtype == base[name].dtype for name in base)
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    adapted = {name.partition(".")[0] for name in load_file(trained / "lora.safetensors")}
    assert {lora_name(name.removesuffix(".weight")) for name in changed} == adapted

    models = [str(path) if option == "{dit}" else option for option in MODELS]
    in_bf16 = ["--mixed_precision", "bf16"]
    by_file, _ = infer(*in_bf16, models=models)
    while_loading, _ = infer(*in_bf16, *loras, "--lora_mode", "merge")
    assert torch.equal(latent(by_file), latent(while_loading)), "rounded once to bf16, both"

    # a second time it is in the way; with a prompt the same command renders too
    again = ["infer", "--dit", source, *loras, "--save_merged_model", path]
    code, _, err = hyimg(*again)
    assert code == 2
    assert "exists" in err
    data = path.read_bytes()
    both, _ = infer(*loras, "--save_merged_model", tmp_path / "second.safetensors")
    assert both.exists()
    assert load_file(tmp_path / "second.safetensors").keys() == merged.keys()
    assert path.read_bytes() == data


# Calls of the model


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], [1] * 6),
        (["--batch_cond_uncond", "on"], [2] * 3),
        (["--guidance_scale", "1"], [1] * 3),
        (["--guidance_scale", "1", "--batch_cond_uncond", "on"], [1] * 3),
        (["--sampler", "heun"], [1] * 10),
    ],
)
def test_the_model_is_called_no_more_than_needed(infer, calls, extra, expected):
    infer(*extra)
    assert calls == expected


def test_one_call_with_both_prompts_is_the_same_picture_but_for_rounding(infer):
    prompt = ["--prompt", 'a sign "GO" on a long road', "--mixed_precision", "no"]
    apart, _ = infer(*prompt)
    together, _ = infer(*prompt, "--batch_cond_uncond", "on")
    torch.testing.assert_close(latent(together), latent(apart), atol=1e-4, rtol=1e-4)
    assert read_settings(together)["batch_cond_uncond"] == "on"
    assert read_settings(apart)["batch_cond_uncond"] == "off", "what auto is on a CPU"


# One model in memory at a time


def test_texts_come_first_then_one_dit_then_one_vae(infer, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a cat\na dog --n fog\na sign "GO"\n', encoding="utf-8")
    order, dits = [], []

    def noted(name, function):
        def call(*arguments, **named):
            gc.collect()
            order.append((name, sum(dit() is not None for dit in dits)))
            result = function(*arguments, **named)
            if isinstance(result, DiT):
                dits.append(weakref.ref(result))
            return result

        return call

    monkeypatch.setattr(stage, "encode_states", noted("texts", render_plan.encode_states))
    monkeypatch.setattr(DiTSetup, "load", noted("dit", DiTSetup.load))
    monkeypatch.setattr(stage, "load_decoder", noted("vae", render_plan.load_decoder))
    infer("--from_file", prompts)
    assert order == [("texts", 0), ("dit", 0), ("vae", 0)], "name, and how many DiTs were in memory"
    assert len(dits) == 1


# Pictures that repeat


def test_a_picture_is_repeated_bit_by_bit_from_its_settings(hyimg, infer, trained, tmp_path):
    lora = trained / "lora.safetensors"
    how = ["--lora_weight", lora, "--lora_multiplier", "0.6", "--exclude_patterns", "txt_"]
    how += ["--lora_mode", "merge", "--negative_prompt", "a blue sky", "--guidance_scale", "4"]
    how += ["--flow_shift", "3", "--sampler", "dpm++2m", "--apg_start_step_general", "1"]
    how += ["--guidance_rescale", "0.3", "--guidance_rescale_apg", "0.2", "--batch_cond_uncond", "on"]
    how += ["--fp8_scaled", "--fp8_vl", "--vae_chunk_size", "1", "--image_size", "96", "64"]
    first, said = infer(*how)
    assert "`--lora_mode merge` with `--fp8_scaled` rounds most of a LoRA away" in said
    repeated, said = infer("--from_image", first, "--lora_weight", lora, size=[])
    assert first.read_bytes() == repeated.read_bytes()
    assert "not be the same" not in said
    streamed, _ = infer("--from_image", first, "--lora_weight", lora, "--blocks_to_swap", "1", size=[])
    assert first.read_bytes() == streamed.read_bytes(), "where weights are kept is no setting"
    # what is given wins, and nothing else changes
    other, _ = infer("--from_image", first, "--lora_weight", lora, "--seed", "6", "--no_fp8_vl", size=[])
    before, after = read_settings(first), read_settings(other)
    assert {key for key in before if before[key] != after[key]} == {"seed", "fp8_vl"}


def test_a_picture_of_a_batch_is_repeated_alone(infer, tmp_path, monkeypatch):
    sizes = []
    layer = qwen.decoder_layer
    monkeypatch.setattr(qwen, "decoder_layer", lambda x, *a, **k: sizes.append(len(x)) or layer(x, *a, **k))
    prompts = tmp_path / "prompts.txt"
    # of equal length, which encoders like to batch; kernels round by a batch's shape, if not on this machine
    prompts.write_text("a cat\na dog\na sun\n", encoding="utf-8")
    path, _ = infer("--from_file", prompts)
    assert set(sizes) == {1}
    third = path.with_name("0-0003.png")
    alone, _ = infer("--from_image", third, size=[])
    assert read_settings(third)["prompt"] == "a sun"
    assert third.read_bytes() == alone.read_bytes(), "a drawn seed too"


def test_loras_of_a_picture_are_found_by_name_and_checked_by_content(hyimg, infer, trained, tmp_path):
    lora = tmp_path / "cat.safetensors"
    lora.write_bytes((trained / "lora.safetensors").read_bytes())
    first, _ = infer("--lora_weight", lora)
    found, said = infer("--from_image", first, size=[])
    assert first.read_bytes() == found.read_bytes()
    assert "warning: `" not in said.replace("warning: 96x64", "")

    lora.write_bytes((trained / "lora-000001.safetensors").read_bytes())
    arguments = [*MODELS, "--from_image", first, "--save_path", tmp_path / "new.png"]
    code, _, err = hyimg("infer", *arguments)
    assert code == 2
    assert "cat.safetensors` is not the LoRA that" in err
    lora.rename(tmp_path / "dog.safetensors")
    code, _, err = hyimg("infer", *arguments)
    assert code == 2
    assert "was made with the LoRA `cat.safetensors`, which is neither next to it" in err
    assert not (tmp_path / "new.png").exists()
    # a file that is named is the user's own choice, told and taken
    code, _, err = hyimg("infer", *arguments, "--lora_weight", tmp_path / "dog.safetensors")
    assert code == 0
    assert "was made with other files for `--lora_weight`" in err


def test_another_model_file_is_told(infer, tmp_path, model):
    other = tmp_path / "other.safetensors"
    dit = DiT(DIT_TINY)
    init_random(dit, 99)
    save_file({name: tensor.bfloat16() for name, tensor in dit.state_dict().items()}, other)
    first, _ = infer()
    models = [str(other) if option == "{dit}" else option for option in MODELS]
    _, said = infer("--from_image", first, models=models, size=[])
    assert "was made with other files for `--dit`" in said


# Sessions


@pytest.fixture
def session(hyimg, tmp_path, monkeypatch):
    """Feeds lines to a session, and gives the exit code, what was said, and the folder of its pictures."""

    def call(text, *extra):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        folder = tmp_path / "session"
        code, out, err = hyimg("infer", *MODELS, *SIZE, "--interactive", "--save_path", folder, *extra)
        assert out == "", "a pipe is not asked"
        return code, err, folder

    return call


def test_a_session_answers_line_by_line_with_models_that_stay(session, infer, monkeypatch):
    loads, encoded = [], []
    load, load_decoder, encode = DiTSetup.load, render_plan.load_decoder, render_plan.encode_states
    monkeypatch.setattr(DiTSetup, "load", lambda *a, **k: loads.append("dit") or load(*a, **k))
    monkeypatch.setattr(interactive, "load_decoder", lambda *a: loads.append("vae") or load_decoder(*a))
    monkeypatch.setattr(interactive, "encode_states", lambda *a: encoded.append(list(a[1])) or encode(*a))
    text = "a red square --d 5\na cat --w 100\na dog --cn x\na red square --d 6 --w 64 --ss heun\n\na cat\n"
    code, err, folder = session(text)
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["0001.png", "0002.png"], "an empty line ends"
    assert loads == ["dit", "vae"]
    assert encoded == [["a red square", ""]], "known prompts are not encoded again"
    assert "warning: prompt: `--w` must be a multiple of 32, got 100 (nearest: 96 or 128)" in err
    assert "the flag `--cn` is for other models" in err
    assert "stay loaded on cpu" in err
    alone, _ = infer()
    assert np.array_equal(pixels(folder / "0001.png"), pixels(alone))
    settings = read_settings(folder / "0002.png")
    assert (settings["width"], settings["seed"], settings["sampler"]) == (64, 6, "heun")
    _, _, folder = session("a cat")
    assert len(list(folder.iterdir())) == 3, "filled up; a last line without an end counts"


def test_a_failed_picture_does_not_end_a_session(session, trained):
    lora = ["--lora_weight", trained / "lora.safetensors", "--lora_multiplier", "1e38"]
    code, err, folder = session("a cat\n", *lora)
    assert code == 0
    assert "warning: the latent is not finite" in err
    assert not folder.exists()


# Distilled checkpoints


@pytest.fixture(scope="session")
def distilled(tmp_path_factory):
    """A tiny distilled DiT, told from the base by its tensors alone."""
    path = tmp_path_factory.mktemp("distilled") / "distilled.safetensors"
    dit = DiT(replace(DIT_TINY, guidance_embed=True, meanflow=True))
    init_random(dit, 3)
    save_file({name: tensor.bfloat16() for name, tensor in dit.state_dict().items()}, path)
    return path


def test_a_distilled_checkpoint_brings_its_own_settings_and_takes_loras_of_the_base(
    hyimg, infer, calls, distilled, trained, tmp_path
):
    models = [str(distilled) if option == "{dit}" else option for option in MODELS]
    size = ["--image_size", "64", "96"]
    plain, said = infer("--batch_cond_uncond", "on", "--preset", "comfyui", models=models, size=size)
    assert "shift 4, guidance 3.25, no APG" in said
    assert calls == [1] * 8, "no pass without the prompt"
    settings = read_settings(plain)
    assert (settings["infer_steps"], settings["flow_shift"], settings["guidance_scale"]) == (8, 4.0, 3.25)
    lora, said = infer("--lora_weight", trained / "lora.safetensors", models=models, size=size)
    assert "32 of 32 modules" in said
    assert not np.array_equal(pixels(plain), pixels(lora))
    scale, _ = infer("--guidance_scale", "5", models=models, size=size)
    assert not np.array_equal(pixels(plain), pixels(scale)), "guidance is inside the model"
    arguments = ["infer", *models, *size, "--prompt", "x", "--save_path", tmp_path / "x.png"]
    code, _, err = hyimg(*arguments, "--sampler", "heun")
    assert code == 2
    assert "`heun` cannot render with a distilled checkpoint" in err


# The rest of the list


def test_a_plugins_sampler_takes_its_arguments(infer, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from hyimg.hookspecs import hookimpl\n"
        "from hyimg.flow.samplers import euler\n"
        "def mine(denoise, x, sigmas, callback, *, strength=1.0):\n"
        "    return strength * euler(denoise, x, sigmas, callback)\n"
        "@hookimpl\n"
        "def hyimg_samplers():\n"
        "    return {'mine': mine}\n",
        encoding="utf-8",
    )
    own = ["--plugin", plugin, "--sampler", "Mine", "--sampler_args", "strength=0.5"]
    half, _ = infer(*own)
    whole, _ = infer()
    torch.testing.assert_close(latent(half), latent(whole) / 2)
    repeated, _ = infer("--from_image", half, "--plugin", plugin, size=[])
    assert repeated.read_bytes() == half.read_bytes()


def test_tiles_of_the_vae_change_no_more_than_rounding(infer):
    size = ["--image_size", "320", "256", "--infer_steps", "1"]
    whole, _ = infer(size=size)
    tiled, _ = infer("--vae_tile_size", "128", size=size)
    assert np.abs(pixels(whole).astype(int) - pixels(tiled).astype(int)).max() <= 1


def test_progress_is_told_with_a_rate(infer):
    _, said = infer()
    assert re.search(r"render: 3/3 \([\d.]+ (step/s|s/step), \d+ s\)", said)
