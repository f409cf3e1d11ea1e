"""Wrong input: one sentence that names the thing, exit code 2 before long work, and nothing on disk changed."""

from __future__ import annotations

import os
import shutil
import zipfile

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from hyimg.checkpoints import safetensors_file

RENDER = ["--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--prompt", "x", "--image_size", "64", "64"]


def snapshot(folder):
    """Every file's content below a folder, the index of a cache (a memory that may grow) left out."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "index.sqlite" not in p.name}


@pytest.fixture
def refused(hyimg, tmp_path, monkeypatch, model):
    """Asserts that a command line is refused with these words, reads no weight, and changes no file."""

    def read(self, name, device="cpu"):
        raise AssertionError(f"the weight {name} was read")

    def call(*arguments, words):
        before = snapshot(tmp_path) | snapshot(model.directory)
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_file.Checkpoint, "read", read)
            code, out, err = hyimg(*arguments)
        assert code == 2, err
        assert out == ""
        assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
        assert "Traceback" not in err
        for word in words:
            assert str(word) in err, err
        assert snapshot(tmp_path) | snapshot(model.directory) == before
        return err

    return call


def damaged(model, tmp_path, kind):
    """A broken stand-in for the DiT file."""
    path = tmp_path / f"{kind}.safetensors"
    data = model.dit.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "pickle":
        path = tmp_path / "model.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    elif kind == "garbage":
        path.write_bytes(b"\xff" * 5000)
    elif kind == "incomplete":
        state = load_file(model.dit)
        del state["single_blocks.3.linear2.weight"]
        save_file(state, path)
    elif kind == "folder":
        path.mkdir()
    return path


BROKEN = {
    "missing": ["there is no file"],
    "truncated": ["is truncated"],
    "pickle": ["pickle"],
    "garbage": ["safetensors"],
    "incomplete": ["`single_blocks.3.linear2.weight` is missing"],
    "folder": ["folder"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_file(kind, refused, tmp_path, model, cached_dataset):
    path = damaged(model, tmp_path, kind)
    output = tmp_path / "out"
    train = ["train", "--dit", path, "--dataset_config", cached_dataset, "--output_dir", output]
    refused(*train, words=[path.name, *BROKEN[kind]])
    infer = ["infer", "--dit", path, "--vae", "{vae}", *RENDER, "--save_path", output / "a.png"]
    refused(*infer, words=[path.name, *BROKEN[kind]])


@pytest.mark.parametrize(
    ("option", "given", "words"),
    [
        ("--dit", "{vae}", ["is a VAE, not a diffusion transformer (DiT)"]),
        ("--vae", "{dit}", ["not a VAE"]),
        ("--text_encoder", "{byt5}", ["not"]),
        ("--byt5", "{text_encoder}", ["not"]),
    ],
)
def test_one_model_given_for_another(option, given, words, refused, tmp_path):
    files = {"--dit": "{dit}", "--vae": "{vae}", "--text_encoder": "{text_encoder}", "--byt5": "{byt5}"}
    files[option] = given
    arguments = [a for pair in files.items() for a in pair]
    refused("infer", *arguments, "--prompt", "x", "--save_path", tmp_path / "a.png", words=words)


def break_dataset(own_dataset, kind):
    images = own_dataset.parent / "images"
    if kind == "unreadable image":
        (images / "1.png").write_bytes(b"not a picture")
        return ["1.png"]
    if kind == "missing caption":
        (images / "2.txt").unlink()
        return ["2.png", "caption"]
    text = own_dataset.read_text(encoding="utf-8")
    changes = {
        "unknown key": ("num_repeats = 1", "num_repeat = 1", ["num_repeat", "num_repeats"]),
        "resolution": ("resolution = 128", "resolution = 100\nenable_bucket = false", ["100", "32"]),
        "bucket steps": (
            "bucket_reso_steps = 32",
            "bucket_reso_steps = 48",
            ["bucket_reso_steps", "48", "32"],
        ),
        "missing folder": ('"images"', '"pictures"', ["pictures"]),
        "not TOML": ("[general]", "[general", ["data.toml", "TOML"]),
        "wrong type": ("batch_size = 2", 'batch_size = "two"', ["batch_size", "two"]),
    }
    old, new, words = changes[kind]
    assert old in text
    own_dataset.write_text(text.replace(old, new), encoding="utf-8")
    return words


@pytest.mark.parametrize(
    "kind",
    [
        "unreadable image",
        "missing caption",
        "unknown key",
        "resolution",
        "bucket steps",
        "missing folder",
        "not TOML",
        "wrong type",
    ],
)
def test_a_broken_dataset(kind, refused, own_dataset, tmp_path):
    words = break_dataset(own_dataset, kind)
    refused("cache-latents", "--dataset_config", own_dataset, "--vae", "{vae}", words=words)
    train = ["train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"]
    refused(*train, words=words)


def test_an_output_folder_that_cannot_be_written(refused, tmp_path, cached_dataset):
    place = tmp_path / "file"
    place.write_text("in the way")
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", place / "out"]
    refused(*train, words=["cannot write", place])
    infer = ["infer", "--dit", "{dit}", "--vae", "{vae}", *RENDER, "--save_path", place / "a.png"]
    refused(*infer, words=["cannot write", place])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    sample = ["sample", "--dit", "{dit}", "--vae", "{vae}", *RENDER[:4], "--prompts", prompts]
    refused(*sample, "--output_dir", place / "out", words=["cannot write", place])


def test_a_name_that_no_file_can_have(refused, tmp_path, trained):
    long = tmp_path / ("x" * 252 + ".png")
    infer = ["infer", "--dit", "{dit}", "--vae", "{vae}", *RENDER]
    refused(*infer, "--save_path", long, words=["the name is too long"])
    lora, target = trained / "lora.safetensors", long.with_suffix(".safetensors")
    merging = [*infer[:3], "--lora_weight", lora, "--save_merged_model", target]
    refused(*merging, words=["the name is too long"])
    refused("convert-comfy", lora, target, words=["the name is too long"])
    refused("merge", lora, lora, "-o", target, words=["the name is too long"])


def test_what_is_read_is_not_written_over(refused, tmp_path, trained, model):
    lora, vae = tmp_path / "lora.safetensors", tmp_path / "vae.safetensors"
    shutil.copyfile(trained / "lora.safetensors", lora)
    shutil.copyfile(model.vae, vae)
    shards = tmp_path / "dit"
    shards.mkdir()
    shutil.copyfile(model.dit, shards / "model.safetensors")
    infer = ["infer", "--dit", shards, "--vae", vae, *RENDER, "--lora_weight", lora, "--overwrite"]
    latent = ["--output_type", "latent", "--save_path"]
    merged = [*latent, tmp_path / "x.safetensors", "--save_merged_model"]
    refused(*infer, *latent, lora, words=["`--save_path`", "lora.safetensors` is the `--lora_weight` itself"])
    refused(*infer, *merged, lora, words=["`--save_merged_model`", "is the `--lora_weight` itself"])
    refused(*infer, *merged, vae, words=["is the `--vae` itself"])
    for name in ("model.safetensors", "merged.safetensors"):
        refused(
            *infer, *merged, shards / name, words=["is in the folder of the `--dit`, which holds one model"]
        )
    refused(*infer, *merged, tmp_path / "x.safetensors", words=["`--save_path` are both"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(refused, tmp_path, cached_dataset):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", folder / "out"]
    refused(*train, words=["cannot write", "choose a folder that you may write"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--loss_type", "l3"], ["`l3` is unknown", "`l2`"]),
        (["--timestep_sampling", "sigmod"], ["did you mean `sigmoid`"]),
        (["--optimizer_type", "Adam8bit"], ["did you mean `AdamW8bit`"]),
        (["--optimizer_type", "torch.optim.Nothing"], ["`torch.optim.Nothing` cannot be imported"]),
        (["--optimizer_args", "weight_decy=1"], ["unknown argument `weight_decy`", "weight_decay"]),
        (["--loss_type", "huber", "--loss_args", "c=1"], ["unknown argument `c`"]),
        (["--min_timestep", "800", "--max_timestep", "200"], ["`--min_timestep` 800 is not below"]),
        (["--network_args", "network_reg_dims=(=4"], ["valid"]),
        (["--network_args", "network_reg_dims=.*=0"], ["the network is empty"]),
        (["--network_args", "rank_dropout=1"], ["`rank_dropout` in `--network_args` must be below 1"]),
        (["--network_args", "network_reg_dims=nothing=4", "--strict_patterns"], ["nothing"]),
        (["--output_name", "a/b"], ["must be a plain name"]),
        (["--plugin", "no_such_module"], ["cannot be imported"]),
        (["--plugin", "nowhere.py"], ["`nowhere.py` does not exist"]),
        (["--device", "tpu"], ["`tpu`"]),
        (["--cache_latents"], ["`--cache_latents` needs `--vae`"]),
        (["--blocks_to_swap", "9"], ["more than this model's 1"]),
    ],
)
def test_wrong_training_options(extra, words, refused, tmp_path, cached_dataset):
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "out"]
    refused(*train, *extra, words=words)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--image_size", "1000", "1024"], ["multiple of 32"]),
        (["--sampler", "eular"], ["did you mean `euler`"]),
        (["--lora_weight", "{vae}"], ["is not a LoRA but a VAE"]),
        (["--lora_multiplier", "1"], ["`--lora_multiplier` without `--lora_weight`"]),
        (["--from_file", __file__], ["one of `--prompt` and `--from_file`"]),
        (["--from_file", "none.txt"], ["`--from_file`: there is no file `none.txt`"]),
        (["--save_path", "picture.jpg"], ["saved as PNG"]),
        (["--save_path", "{dit}/a.png"], ["cannot write"]),
        (["--include_patterns", "x"], ["1 value of `--include_patterns` for 0 LoRA files"]),
        (["--interactive"], ["give one of `--prompt` and `--interactive`"]),
        (["--save_merged_model", "m.safetensors"], ["`--save_merged_model` without `--lora_weight`"]),
        (["--from_image", __file__], ["cannot be read as an image"]),
        (["--lora_mode", "fused"], ["must be one of `live`, `merge`"]),
        (["--batch_cond_uncond", "maybe"], ["must be one of `auto`, `on`, `off`"]),
    ],
)
def test_wrong_render_options(extra, words, refused, tmp_path, model):
    extra = [e.replace("{dit}", str(model.dit)) if e != "{dit}" else e for e in extra]
    infer = ["infer", "--dit", "{dit}", "--vae", "{vae}", *RENDER, "--save_path", tmp_path / "a.png"]
    refused(*infer, *extra, words=words)


def test_a_lora_of_another_width(refused, tmp_path, golden):
    lora = tmp_path / "wide.safetensors"
    shutil.copyfile(golden / "lora_kohya.safetensors", lora)
    infer = ["infer", "--dit", "{dit}", "--vae", "{vae}", *RENDER, "--save_path", tmp_path / "a.png"]
    refused(*infer, "--lora_weight", lora, words=["width 96", "64"])
    refused(*infer, "--lora_weight", lora, lora, "--lora_multiplier", *"1 2 3".split(), words=["3 values"])

    sheet = ["sample", "--dit", "{dit}", "--vae", "{vae}", *RENDER[:4], "--output_dir", tmp_path / "out"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    refused(*sheet, "--prompts", prompts, "--lora_weight", lora, words=["width 96", "64"])
    refused(*sheet, "--prompts", prompts, "--run", tmp_path / "prompts.txt", words=["is not a folder"])


def test_a_lora_with_nan_is_found_before_any_model_is_read(refused, tmp_path, trained):
    state = load_file(trained / "lora.safetensors")
    state["lora_unet_single_blocks_0_linear1.lora_up.weight"][0, 0] = torch.nan
    lora, prompts = tmp_path / "nan.safetensors", tmp_path / "prompts.txt"
    save_file(state, lora)
    prompts.write_text("a cat\n")
    models = ["--dit", "{dit}", "--vae", "{vae}", *RENDER[:4], "--lora_weight", lora]
    infer = ["infer", *models, "--prompt", "x", "--save_path", tmp_path / "a.png"]
    words = ["nan.safetensors` holds NaN or infinity", "single_blocks_0_linear1"]
    for mode in ("live", "merge"):
        refused(*infer, "--lora_mode", mode, words=words)
    refused("sample", *models, "--prompts", prompts, "--output_dir", tmp_path / "out", words=words)


def test_prompt_lines_with_bad_flags_are_told_together(refused, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 100\na dog\na sun --cfg 3\n")
    words = ["line 1: `--w` must be a multiple of 32, got 100", "line 3: the flag `--cfg` is unknown"]
    models = ["--dit", "{dit}", "--vae", "{vae}", *RENDER[:4]]
    infer = ["infer", *models, "--from_file", prompts, "--save_path", tmp_path / "out"]
    refused(*infer, words=words)
    refused("sample", *models, "--prompts", prompts, "--output_dir", tmp_path / "out", words=words)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--include_patterns", "nothing"], ["leaves none of the 32 modules", "there are, for example"]),
        (["--include_patterns", "img_atn_qkv"], ["leaves none", "the nearest names are `img_attn_qkv`"]),
        (["--include_patterns", "img", "--exclude_patterns", "."], ["leave none of the 32 modules"]),
        (["--exclude_patterns", "("], ["`(` in `--exclude_patterns` is not a valid regular expression"]),
        (["--exclude_patterns", "a", "b"], ["2 values of `--exclude_patterns` for 1 LoRA file"]),
        (["--save_merged_model", "{dit}"], ["is the `--dit` itself"]),
        (["--save_merged_model", "m.ckpt"], ["`m.ckpt` is not the name of a `.safetensors` file"]),
        (["--save_merged_model", "{dit}/m.safetensors"], ["cannot write"]),
        (["--save_merged_model", "m.safetensors", "--fp8_scaled"], ["in the types of their file"]),
    ],
)
def test_wrong_options_of_a_lora(extra, words, refused, tmp_path, model, trained):
    extra = [e.replace("{dit}", str(model.dit)) for e in extra]
    infer = ["infer", "--dit", "{dit}", "--vae", "{vae}", *RENDER, "--save_path", tmp_path / "a.png"]
    refused(*infer, "--lora_weight", trained / "lora.safetensors", *extra, words=words)


def test_an_fp8_model_is_not_merged_into(refused, tmp_path, model, trained):
    state = load_file(model.dit)
    for name, tensor in state.items():
        if name.endswith(".weight") and "_blocks." in name and "norm" not in name:
            state[name] = tensor.to(torch.float8_e4m3fn)
    path = tmp_path / "fp8.safetensors"
    save_file(state, path)
    infer = ["infer", "--dit", path, "--vae", "{vae}", *RENDER, "--save_path", tmp_path / "a.png"]
    infer += ["--lora_weight", trained / "lora.safetensors"]
    refused(*infer, "--lora_mode", "merge", words=["`--lora_mode merge`", "which is fp8", "on fp8 weights"])
    merged = ["--save_merged_model", tmp_path / "m.safetensors"]
    refused(*infer, *merged, words=["`--save_merged_model`", "which is fp8", "bf16"])


def test_a_picture_that_cannot_be_repeated(refused, tmp_path):
    path = tmp_path / "plain.png"
    infer = ["infer", "--dit", "{dit}", "--vae", "{vae}", *RENDER[:4], "--save_path", tmp_path / "a.png"]
    infer += ["--from_image", path]
    image = Image.new("RGB", (32, 32))
    image.save(path)
    refused(*infer, words=["plain.png` has no settings to render it from"])
    for settings, words in (
        ("[1]", ["must be an object, not a list"]),
        ('{"prompt": "x", "infer_steps": 3}', ["has no settings to render it from"]),
        ('{"prompt": "x", "fingerprints": {}, "infer_steps": -1}', ["`--infer_steps` in", "plain.png"]),
        ('{"prompt": "x", "fingerprints": {}, "loras": 3}', ["are not a list of files"]),
        (
            '{"prompt": "x", "fingerprints": {}, "loras": [{"file": "%s"}]}' % ("a" * 300),
            ["which is neither next to it"],
        ),
    ):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("hyimg", settings)
        image.save(path, pnginfo=info)
        refused(*infer, words=words)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("hyimg", '{"prompt": "x", "fingerprints": {}}')
    image.save(path, pnginfo=info)
    refused(*infer, "--interactive", words=["`--from_image` brings its own prompt"])


def test_a_session_needs_a_folder(refused, tmp_path):
    infer = ["infer", "--dit", "{dit}", "--vae", "{vae}", *RENDER[:4], "--interactive"]
    refused(*infer, "--save_path", tmp_path / "a.png", words=["is one file", "name a folder"])
    refused(*infer, words=["`--save_path` is required"])


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_accelerates_sharding_is_refused_before_anything_else_is_looked_at(
    refused, tmp_path, monkeypatch, variable, name
):
    monkeypatch.setenv(variable, "true")
    dit = tmp_path / "dit.safetensors"
    dit.write_bytes(b"no header")
    train = ["train", "--dit", dit, "--dataset_config", dit, "--output_dir", tmp_path / "out"]
    refused(*train, words=[f"accelerate is configured for {name}", "--num_processes N"])


def test_no_caches_say_which_command_to_run(refused, own_dataset, tmp_path):
    shutil.rmtree(own_dataset.parent / "hyimg-cache")
    train = ["train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"]
    refused(*train, words=["no latent cache", "hyimg cache-latents --dataset_config"])


def test_without_the_check_of_the_caches_a_missing_entry_is_told_at_its_step(hyimg, own_dataset, tmp_path):
    for entry in (own_dataset.parent / "hyimg-cache" / "latents").rglob("*/*.safetensors"):
        entry.unlink()
    train = ["train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"]
    code, _, err = hyimg(*train, "--skip_cache_check")
    assert code == 1
    assert "1 parameter group" in err, "the run has begun"
    assert "needed for" in err
    assert "hint: run `hyimg cache-latents" in err


def test_a_damaged_cache_entry_is_made_again_and_never_used(hyimg, own_dataset, tmp_path):
    entry = next((own_dataset.parent / "hyimg-cache" / "latents").rglob("*/*.safetensors"))
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    train = ["train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"]
    code, _, err = hyimg(*train)
    assert code == 2
    assert "no latent cache for" in err
    _, _, err = hyimg("cache-latents", "--dataset_config", own_dataset, "--vae", "{vae}")
    assert "latents: 1 made" in err
    assert "4 kept" in err
