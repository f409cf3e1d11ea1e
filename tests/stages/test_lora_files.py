"""LoRA files by the commands: convert-comfy, merge, check, and files of any kind in infer and train."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyimg.config.rendering import SheetOptions
from hyimg.lora.files.conversion import convert, read_adapters, save_lora
from hyimg.lora.network import AdapterNetwork
from hyimg.model.loading import load_dit
from hyimg.report import SilentReporter
from hyimg.stages.sample import _lora_files

FORMS = ("kohya", "comfy", "peft", "diffusers")
MODELS = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
QUICK = ["--image_size", "32", "64", "--infer_steps", "2", "--guidance_scale", "1", "--mixed_precision", "no"]


def module(kind, rows, columns, factor=8):
    """A LoHa or LoKr by role, as large as is seen in a picture."""
    if kind == "loha":
        state = {f"hada_{w}_a": torch.randn(rows, 2) for w in ("w1", "w2")}
        return state | {f"hada_{w}_b": torch.randn(2, columns) * 0.1 for w in ("w1", "w2")}
    return {
        "lokr_w1": torch.randn(factor, factor) * 0.1,
        "lokr_w2": torch.randn(rows // factor, columns // factor),
    }


def peft_folder(folder, network):
    """The same LoRA as PEFT saves it of a compiled model: alpha is in `adapter_config.json` alone."""
    state = {}
    for planned, adapter in network.adapters():
        stem = f"base_model.model._orig_mod.{planned.name}"
        state[f"{stem}.lora_A.weight"] = adapter.lora_down.weight
        state[f"{stem}.lora_B.weight"] = adapter.lora_up.weight
    folder.mkdir()
    save_file({name: tensor.detach() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["linear1"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """A LoRA of the tiny model in every form, and a file of LoHas and LoKrs, by name."""
    folder = tmp_path_factory.mktemp("loras")
    dit = load_dit(model.dit, dtype=torch.float32)
    network = AdapterNetwork.create(dit, rank=4, alpha=2.0, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, adapter in network.adapters():
            adapter.lora_up.weight.normal_(std=0.2)
    paths = {form: folder / f"{form}.safetensors" for form in (*FORMS, "lycoris")}
    save_lora(paths["kohya"], network.state())
    for form in FORMS[1:]:
        convert(paths["kohya"], paths[form], to=form)
    paths["folder"] = peft_folder(folder / "peft", network)
    state = {}
    for number, (planned, _) in enumerate(network.adapters()):
        own = module(("loha", "lokr")[number % 2], planned.out_features, planned.in_features)
        state |= {f"{planned.lora_name}.{role}": tensor for role, tensor in own.items()}
    save_file(state, paths["lycoris"])
    return paths


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_is_the_same_with_a_file_of_any_form(hyimg, files, tmp_path):
    pictures = {}
    for form in ("base", *FORMS, "folder", "lycoris", "merged"):
        path = tmp_path / f"{form}.png"
        loras = [] if form == "base" else ["--lora_weight", files.get(form, tmp_path / "merged.safetensors")]
        if form == "merged":
            # the LoHas and LoKrs as plain LoRAs of full rank: the same function by another way
            merging = ["merge", files["lycoris"], files["lycoris"], "--weights", "0.25", "0.75"]
            code, _, err = hyimg(*merging, "-o", loras[1], "--max_rank", "256")
            assert code == 0, err
        code, _, err = hyimg(
            "infer", *MODELS, *QUICK, "--prompt", "x", "--seed", "1", "--save_path", path, *loras
        )
        assert code == 0, err
        pictures[form] = pixels(path)
    for form in (*FORMS[1:], "folder"):
        assert np.abs(pictures[form] - pictures["kohya"]).max() <= 1
    assert np.abs(pictures["kohya"] - pictures["base"]).max() > 20
    assert np.abs(pictures["lycoris"] - pictures["base"]).max() > 20
    assert np.abs(pictures["lycoris"] - pictures["merged"]).max() <= 1


def test_lycoris_is_accepted_and_changes_nothing(hyimg, files, tmp_path):
    arguments = ["infer", *MODELS, *QUICK, "--prompt", "x", "--seed", "1", "--lora_weight", files["lycoris"]]
    for name, extra in (("plain", []), ("flag", ["--lycoris"])):
        code, _, err = hyimg(*arguments, "--save_path", tmp_path / f"{name}.png", *extra)
        assert code == 0, err
    assert "detected automatically" in err
    assert np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "flag.png"))


def test_a_folder_of_peft_is_taken_by_every_command(hyimg, files, tmp_path):
    folder, expected = files["folder"], dict(read_adapters(files["kohya"]))
    weights, out = folder / "adapter_model.safetensors", tmp_path / "out.safetensors"
    for command in (
        ["convert-comfy", folder, out, "--to", "kohya"],
        ["convert-comfy", weights, out, "--to", "kohya", "--overwrite"],
        ["merge", folder, weights, "--weights", "0.5", "0.5", "--output", out, "--overwrite"],
    ):
        code, _, err = hyimg(*command)
        assert code == 0, err
        assert "warning" not in err
        for name, update in read_adapters(out):
            theirs = expected[name].delta_rows(slice(None))
            torch.testing.assert_close(update.delta_rows(slice(None)), theirs, rtol=1e-5, atol=1e-6)
    code, shown, _ = hyimg("check", folder, "--json")
    assert code == 0
    found = json.loads(shown)
    assert found["all"]["alphas"] == {"2": len(expected)}
    sheet = SheetOptions(sample_prompts=Path("p"), output_dir=Path("o"), lora_weight=(folder, weights))
    assert _lora_files(sheet, SilentReporter()).lora_weight == (folder, weights), "no run folder"


def test_a_strength_that_no_file_says_is_a_warning_of_every_command(hyimg, files, cached_dataset, tmp_path):
    folder = shutil.copytree(files["folder"], tmp_path / "peft")
    (folder / "adapter_config.json").unlink()
    picture = ["--prompt", "x", "--seed", "1", "--save_path", tmp_path / "x.png"]
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_config"]
    train += ["--output_dir", tmp_path / "run"]
    for command in (
        ["check", folder],
        ["convert-comfy", folder, tmp_path / "out.safetensors"],
        ["merge", folder, files["kohya"], "-o", tmp_path / "both.safetensors"],
        ["infer", *MODELS, *QUICK, *picture, "--lora_weight", folder],
        [*train, "--network_weights", folder, "--dim_from_weights"],
        [*train, "--base_weights", folder, folder],
    ):
        code, _, err = hyimg(*command)
        assert code == 0, err
        assert err.count("there is no `adapter_config.json`") == 1, command


@pytest.mark.parametrize("form", [*FORMS, "folder"])
def test_training_starts_from_a_file_of_any_form(hyimg, files, cached_dataset, tmp_path, form):
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--max_train_steps", "1"]
    train += [
        "--seed",
        "1",
        "--mixed_precision",
        "no",
        "--learning_rate",
        "0",
        "--dim_from_weights",
        "--save_precision",
        "float",
    ]
    code, _, err = hyimg(*train, "--network_weights", files[form], "--output_dir", tmp_path / "run")
    assert code == 0, err
    ours, theirs = (
        dict(read_adapters(path)) for path in (tmp_path / "run" / "lora.safetensors", files["kohya"])
    )
    assert ours.keys() == theirs.keys()
    for name, update in ours.items():
        assert update.rank == 4
        torch.testing.assert_close(
            update.delta_rows(slice(None)), theirs[name].delta_rows(slice(None)), rtol=1e-5, atol=1e-6
        )


def test_training_does_not_start_from_a_lokr_and_says_how_it_could(hyimg, files, cached_dataset, tmp_path):
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "run"]
    code, _, err = hyimg(*train, "--network_weights", files["lycoris"], "--dim_from_weights")
    assert code == 2
    assert "a plain LoRA is needed" in err
    assert "--max_rank" in err
    assert not (tmp_path / "run").exists()


# ---- merge


def test_merging_is_told_and_what_a_smaller_rank_costs(hyimg, files, tmp_path):
    out = tmp_path / "merged.safetensors"
    pair = [files["kohya"], files["diffusers"]]
    code, _, err = hyimg("merge", *pair, "--weights", "0.7", "0.3", "-o", out)
    assert code == 0, err
    assert "32 modules, 0.7 * " in err
    assert "relative error" not in err
    expected = {name: update.delta() for name, update in read_adapters(files["kohya"])}
    for name, update in read_adapters(out):
        assert update.rank >= 8, "ranks add up"
        torch.testing.assert_close(update.delta_rows(slice(None)), expected[name], rtol=1e-5, atol=1e-6)
    code, _, err = hyimg("merge", *pair, "--weights", "2", "--output", out, "--max_rank", "2", "--overwrite")
    assert code == 0, err
    assert f"`--weights` has 1 value for 2 LoRA files: 1 for `{pair[1]}`" in err
    assert f"2 * {pair[0]} + 1 * {pair[1]}" in err
    assert "rank reduced in 32 adapters: relative error 0." in err
    assert {update.rank for _, update in read_adapters(out)} == {2}


def test_wrong_merges_leave_everything_as_it_was(hyimg, files, tmp_path, golden):
    there, out = tmp_path / "there.safetensors", tmp_path / "out.safetensors"
    there.write_bytes(b"mine")
    one, two = files["kohya"], files["comfy"]
    for arguments, words in (
        ([one, "-o", out], "nothing to merge"),
        ([one, two, "--weights", "1", "2", "3", "-o", out], "3 values of `--weights` for 2 LoRA files"),
        ([one, two, "-o", there], "exists"),
        ([one, two, "--weights", "1e300", "1", "-o", out], "which F32 cannot hold"),
        ([one, two, "-o", one, "--overwrite"], "is the source file itself"),
        ([one, two], "`--output` is required"),
        (["-o", out], "`LORAS` is required"),
        ([one, golden / "lora_kohya.safetensors", "-o", out], "for a model of width 96"),
        ([one, two, "-o", tmp_path / "out.pt"], "does not end with `.safetensors`"),
        ([one, tmp_path / "none.safetensors", "-o", out], "none.safetensors"),
    ):
        code, stdout, err = hyimg("merge", *arguments)
        assert (code, stdout) == (2, ""), err
        assert words in err
    assert there.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["there.safetensors"]


# ---- check


def test_check_tells_who_loads_a_file_and_what_each_drops(hyimg, files, golden, tmp_path):
    for form, loads in {
        "kohya": ("part", "all", "none", "none"),
        "comfy": ("all", "part", "none", "none"),
        "peft": ("all", "none", "none", "all"),
        "diffusers": ("none", "none", "all", "none"),
        "lycoris": ("part", "none", "none", "none"),
    }.items():
        code, out, err = hyimg("check", files[form], "--dit", "{dit}", "--json")
        assert code == 0, err
        found = {verdict["name"]: verdict for verdict in json.loads(out)["consumers"]}
        assert tuple(verdict["loads"] for verdict in found.values()) == loads, form
        assert all(v["applied"] + len(v["dropped"]) == 32 for v in found.values())
    lora = shutil.copy(golden / "lora_kohya.safetensors", tmp_path / "my lora.safetensors")
    code, out, err = hyimg("check", lora)
    assert (code, err) == (0, "")
    assert "ComfyUI: applies 14 of 24 modules\n  drops img_mlp.fc1" in out
    assert "the reference tool (sd-scripts): applies 24 of 24 modules\n" in out
    assert "steps: 40" in out, "and how it was trained"
    # the commands that it shows make the files that they promise
    commands = [
        line.partition("a file for it: hyimg ")[2] for line in out.splitlines() if "a file for it" in line
    ]
    assert len(commands) == 3
    for command in commands:
        arguments = shlex.split(command)
        assert hyimg(*arguments)[0] == 0
        _, out, _ = hyimg("check", arguments[2], "--json")
        assert "all" in {verdict["loads"] for verdict in json.loads(out)["consumers"]}


def test_check_counts_kinds_and_finds_what_does_nothing(hyimg, files, tmp_path):
    state = load_file(files["lycoris"])
    zero = "lora_unet_single_blocks_1_linear2"
    state = {name: tensor for name, tensor in state.items() if not name.startswith(zero)}
    rows, columns = (load_file(files["kohya"])[f"{zero}.lora_{half}.weight"].shape for half in ("up", "down"))
    state[f"{zero}.lora_down.weight"] = torch.randn(2, columns[1])
    state[f"{zero}.lora_up.weight"] = torch.zeros(rows[0], 2)
    state["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "mixed.safetensors")
    code, out, err = hyimg("check", tmp_path / "mixed.safetensors", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["adapters"] == {"LoHa": 15, "LoKr": 16, "LoRA": 1}
    assert found["zero"] == ["single_blocks.1.linear2"]
    assert found["unmapped"] == ["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"]
    assert "warning: 1 tensor of" in err
    norms = {name: update.double().update_norm().item() for name, update in read_adapters(files["lycoris"])}
    del norms["single_blocks.1.linear2"]
    assert found["all"]["norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)


# ---- wrong input


@pytest.fixture
def wrong(tmp_path, files, golden):
    """Files that are no LoRA of the tiny model, by what is wrong with them, and a word of the sentence."""
    folder = tmp_path / "wrong"
    folder.mkdir()
    whole = files["kohya"].read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:-50])
    (folder / "header.safetensors").write_bytes((10**15).to_bytes(8, "little") + b"{" + whole[9:])
    (folder / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (folder / "empty.safetensors").write_bytes(b"")
    save_file({}, folder / "nothing.safetensors")
    foreign = "lora_unet_input_blocks_4_1_proj_in"
    halves = {
        f"{foreign}.lora_down.weight": torch.zeros(2, 4),
        f"{foreign}.lora_up.weight": torch.zeros(4, 2),
    }
    save_file(halves, folder / "sdxl.safetensors")
    save_file({"lora_unet_single_blocks_0_linear1.diff": torch.zeros(4, 4)}, folder / "full.safetensors")
    state = load_file(files["kohya"])
    state["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][0, 0] = torch.nan
    save_file(state, folder / "nan.safetensors")
    return {
        "truncated.safetensors": "is truncated",
        "header.safetensors": "its header would have 1000000000000000 bytes",
        "pickle.pt": "is a pickle",
        "pickle.safetensors": "is a pickle",
        "empty.safetensors": "has only 0 bytes",
        "nothing.safetensors": "holds no tensors",
        "sdxl.safetensors": "but of Stable Diffusion XL",
        "full.safetensors": "is not a LoRA but full weights (LyCORIS's `full`)",
        ".": "is a folder",
        "nan.safetensors": "NaN",
    }, folder


def test_wrong_files_are_one_sentence_and_leave_nothing(hyimg, files, wrong, tmp_path):
    cases, folder = wrong
    out = tmp_path / "out.safetensors"
    picture = ["--prompt", "x", "--save_path", tmp_path / "x.png"]
    for name, words in cases.items():
        path = folder / name
        commands = [
            ["convert-comfy", path, out],
            ["convert-comfy", path, out, "--max_rank", "2"],
            ["merge", files["kohya"], path, "-o", out],
            ["infer", *MODELS, *QUICK, *picture, "--lora_weight", path],
        ]
        if "nan" not in name:
            commands.append(["check", path])
        for arguments in commands:
            code, stdout, err = hyimg(*arguments)
            assert (code, stdout) == (2, ""), (arguments, err)
            assert words in err, (arguments, err)
            assert len(err.splitlines()) <= 2 or "infer" in arguments, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wrong"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_sentence(hyimg, files, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = hyimg("convert-comfy", files["kohya"], tmp_path / "out.safetensors")
    tmp_path.chmod(0o700)
    assert code == 2
    assert "cannot write" in err


def test_an_output_in_the_place_of_something_else_is_refused(hyimg, files, tmp_path):
    (tmp_path / "file").touch()
    for arguments in (
        ["convert-comfy", files["kohya"], tmp_path / "file" / "out.safetensors"],
        ["merge", files["kohya"], files["comfy"], "-o", tmp_path / "file" / "out.safetensors"],
    ):
        code, _, err = hyimg(*arguments)
        assert code == 2
        assert "cannot write" in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_alpha_is_one_number_however_it_is_written(hyimg, files, tmp_path):
    state = load_file(files["kohya"])
    alpha = "lora_unet_double_blocks_0_img_mlp_fc1.alpha"
    lora = tmp_path / "lora.safetensors"
    save_file({**state, alpha: state[alpha].reshape(1)}, lora)
    pictures = []
    for path in (files["kohya"], lora):
        target = tmp_path / f"{len(pictures)}.png"
        arguments = ["--prompt", "x", "--seed", "1", "--lora_weight", path, "--save_path", target]
        code, _, err = hyimg("infer", *MODELS, *QUICK, *arguments)
        assert code == 0, err
        pictures.append(pixels(target))
    assert np.array_equal(*pictures)
    save_file({**state, alpha: torch.ones(2)}, lora)
    for command in (["check", lora], ["convert-comfy", lora, tmp_path / "out.safetensors"]):
        code, _, err = hyimg(*command)
        assert code == 2
        assert f"`{alpha}` in `{lora}` has the shape [2], but an alpha is one number" in err
    assert not (tmp_path / "out.safetensors").exists()


def test_check_reads_fp8(hyimg, files, tmp_path):
    lora = tmp_path / "fp8.safetensors"
    state = {
        name: t.to(torch.float8_e4m3fn) if t.ndim else t for name, t in load_file(files["kohya"]).items()
    }
    save_file(state, lora)
    code, out, err = hyimg("check", lora, "--json")
    assert (code, err) == (0, "")
    whole, coarse = json.loads(hyimg("check", files["kohya"], "--json")[1]), json.loads(out)
    assert coarse["all"]["norm"] == pytest.approx(whole["all"]["norm"], rel=0.02)
    state["lora_unet_single_blocks_0_linear2.lora_up.weight"].view(torch.uint8)[0, 0] = 0x7F
    save_file(state, lora)
    code, out, err = hyimg("check", lora, "--json")
    assert code == 0
    assert json.loads(out)["not_finite"] == ["single_blocks.0.linear2"]
