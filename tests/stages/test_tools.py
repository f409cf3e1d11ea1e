"""The small commands: convert-comfy, inspect-modules, make-tiny-model, plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyimg.checkpoints.header_check import open_dit
from hyimg.model.loading import check_vae

PLUGINS = Path(__file__).parents[2] / "plugins"


# ---- convert-comfy


def test_conversion_equals_the_golden_file_and_comes_back(hyimg, golden, tmp_path):
    comfy, back = tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"
    code, _, err = hyimg("convert-comfy", golden / "lora_kohya.safetensors", comfy)
    assert code == 0, err
    assert "24 modules, kohya to comfy" in err
    code, _, err = hyimg("convert-comfy", comfy, back, "--reverse")
    assert code == 0, err
    for path, name in ((comfy, "lora_comfy"), (back, "lora_kohya")):
        ours, expected = load_file(path), load_file(golden / f"{name}.safetensors")
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_wrong_conversions_leave_everything_as_it_was(hyimg, golden, tmp_path, model):
    source, there = golden / "lora_kohya.safetensors", tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    for arguments, words in (
        ([source, there], "exists"),
        ([source, tmp_path / "x.safetensors", "--reverse"], "already"),
        ([source, tmp_path / "x.safetensors", "--to", "comfyui"], "did you mean `comfy`"),
        ([source, tmp_path / "x.safetensors", "--reverse", "--to", "peft"], "leave one out"),
        ([model.vae, tmp_path / "x.safetensors"], "not a LoRA but a VAE"),
        ([tmp_path / "none.safetensors", tmp_path / "x.safetensors"], "there is no file"),
        ([source, tmp_path / "x.ckpt"], "does not end with `.safetensors`"),
    ):
        code, out, err = hyimg("convert-comfy", *arguments)
        assert (code, out) == (2, "")
        assert words in err
    assert there.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["there.safetensors"]


# ---- inspect-modules


def test_the_known_architecture_needs_no_checkpoint(hyimg, golden):
    code, out, err = hyimg("inspect-modules", "--json")
    assert code == 0, err
    found = json.loads(out)
    expected = json.loads((golden / "lora_modules.json").read_text())
    names = [module["lora_name"] for module in found["modules"]]
    assert len(names) == 320
    assert names == [
        m["lora_name"] for m in (expected["modules"] if isinstance(expected, dict) else expected)
    ]
    assert set(found["modules"][0]) == {
        *("name", "lora_name", "type", "in", "out", "parameters", "rank", "alpha", "learning_rate")
    }


def test_patterns_show_what_each_module_gets(hyimg):
    code, out, err = hyimg(
        *("inspect-modules", "--dit", "{dit}", "--json", "--pattern", "attn_qkv", "--network_dim", "4"),
        *(
            "--network_args",
            "network_reg_dims=attn_qkv=8,txt_attn_qkv=2,nothing=3",
            "network_reg_lrs=img=1e-5",
        ),
    )
    assert code == 0
    rows = {m["name"]: (m["rank"], m["learning_rate"]) for m in json.loads(out)["modules"]}
    assert rows["double_blocks.0.img_attn_qkv"] == (8, 1e-5)
    assert rows["double_blocks.1.txt_attn_qkv"] == (2, 1e-4)
    assert all("attn_qkv" in name for name in rows)
    assert "warning: " in err
    assert "`nothing`" in err


def test_the_table_shows_every_module_and_the_totals(hyimg):
    code, out, _ = hyimg("inspect-modules", "--arch", "tiny")
    assert code == 0
    assert out.count("double_blocks.") == 20
    assert "32 of 32 modules adapted" in out
    assert hyimg("inspect-modules", "--arch", "tiny", "--dit", "{dit}")[0] == 2


def test_the_tree_tells_blocks_that_are_alike_once(hyimg):
    tree = ["inspect-modules", "--tree", "--network_args"]
    code, out, err = hyimg(*tree, r"network_reg_dims=single_blocks\.(\d|1\d)\.=8,double.*img_mod=0")
    assert code == 0, err
    lines = out.splitlines()
    titles = [line.split() for line in lines if "_blocks." in line and line.split()[-1].count(",") > 1]
    assert [title[:2] for title in titles] == [
        ["double_blocks.0..19", "x20"],
        ["single_blocks.0..19", "x20"],
        ["single_blocks.20..39", "x20"],
    ]
    modules = [line.split() for line in lines if line.startswith(("├", "└"))]
    assert len(modules) == 10 + 3 + 3
    assert modules[0][1:] == ["img_mod.linear", "3584", "21504", "77,091,840", "-", "-", "-"]
    assert [row[5] for row in modules[-6:]] == ["8"] * 3 + ["4"] * 3
    assert hyimg(*tree, "dora=True", "--json")[0] == 2


def test_a_fused_module_has_a_line_for_each_of_another_tool_s_names(hyimg):
    asked = ["inspect-modules", "--arch", "tiny", "--names", "diffusers", "--pattern", "_0_linear1"]
    code, out, _ = hyimg(*asked)
    assert code == 0
    block = "transformer.single_transformer_blocks.0."
    ends = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    lines = out.splitlines()[1:5]
    assert [line.split()[0] for line in lines] == [block + end for end in ends]
    assert [len(line.split()) for line in lines] == [7, 1, 1, 1]
    (module,) = json.loads(hyimg(*asked, "--json")[1])["modules"]
    assert module["name"] == "single_blocks.0.linear1"
    assert module["names"] == [block + end for end in ends]


def test_the_totals_are_those_of_a_run_with_the_same_options(hyimg, trained):
    """`trained` saves in float32; its two optimiser moments are twice its weights."""
    asked = ["inspect-modules", "--dit", "{dit}", "--network_dim", "4", "--network_alpha", "4", "--json"]
    totals = json.loads(hyimg(*asked, "--save_precision", "fp32")[1])["totals"]
    file = trained / "lora.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(file).values()) == totals["file_bytes"]
    assert totals["save_precision"] == "float"
    assert totals["optimizer_bytes"] == 8 * totals["trainable_parameters"]
    lion = json.loads(hyimg(*asked, "--optimizer_type", "Lion")[1])["totals"]
    assert 2 * lion["optimizer_bytes"] == totals["optimizer_bytes"]
    assert 2 * lion["file_bytes"] == totals["file_bytes"]
    code, out, _ = hyimg(*asked[:-1], "--optimizer_type", "torch.optim.Rprop")
    assert code == 0
    assert "torch.optim.Rprop state not known" in out


# ---- checkpoints


def test_a_checkpoint_is_checked_to_its_last_tensor_without_torch(hyimg, model, tmp_path):
    state = load_file(model.dit)
    del state["single_blocks.3.linear2.bias"]
    state["surplus.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "dit.safetensors")
    code, out, err = hyimg("inspect-modules", "--dit", tmp_path / "dit.safetensors")
    assert (code, out) == (2, "")
    assert "`single_blocks.3.linear2.bias` is missing; `surplus.weight` is not known" in err
    code = (
        "import sys\nfrom hyimg.cli.app import run\n"
        f"code = run(['inspect-modules', '--json', '--dit', {str(model.dit)!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# ---- make-tiny-model


def test_a_tokenizer_is_not_replaced_unasked(hyimg, tmp_path):
    (tmp_path / "tokenizer.json").write_text("mine")
    code, _, err = hyimg("make-tiny-model", tmp_path)
    assert code == 2
    assert "tokenizer.json` exists" in err
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_full_depth_has_the_real_number_of_blocks(hyimg, tmp_path):
    code, _, err = hyimg("make-tiny-model", tmp_path / "full", "--depth", "full")
    assert code == 0, err
    dit, _, _, vae = sorted((tmp_path / "full").glob("*.safetensors"), key=lambda p: "vae" in p.name)
    arch = open_dit(tmp_path / "full" / "hunyuanimage2.1.safetensors").arch
    assert (arch.num_double, arch.num_single) == (20, 40)
    assert check_vae(vae).latent_channels == arch.latent_channels
    assert (tmp_path / "full" / "tokenizer.json").is_file()
    # files that are there may be real models: never replaced unasked
    before = dit.read_bytes()
    code, _, err = hyimg("make-tiny-model", tmp_path / "full", "--seed", "1")
    assert code == 2
    assert "exists" in err
    assert dit.read_bytes() == before


# ---- plugins


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "lora.metrics.jsonl").read_text().splitlines()]


def test_plugin_files_give_a_loss_and_a_sampler(hyimg, cached_dataset, tmp_path):
    file = PLUGINS / "hyimg-frequency" / "hyimg_frequency.py"
    train = [
        "train",
        "--dit",
        "{dit}",
        "--dataset_config",
        cached_dataset,
        "--max_train_steps",
        "1",
        "--seed",
        "1",
    ]
    train += ["--mixed_precision", "no", "--plugin", file, "--loss_type", "frequency"]
    for folder, gain in (("plain", "1"), ("sharp", "3")):
        code, _, err = hyimg(*train, "--loss_args", f"gain={gain}", "--output_dir", tmp_path / folder)
        assert code == 0, err
    code, _, err = hyimg(*train[:-4], "--output_dir", tmp_path / "l2")
    assert code == 0, err
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "l2"), rel=1e-5), "a gain of 1 is l2"
    assert losses(tmp_path / "sharp")[0] > losses(tmp_path / "l2")[0]

    models = [
        part for name in ("dit", "text_encoder", "byt5", "vae") for part in (f"--{name}", f"{{{name}}}")
    ]
    infer = [
        "infer",
        *models,
        "--prompt",
        "x",
        "--image_size",
        "64",
        "64",
        "--infer_steps",
        "2",
        "--seed",
        "1",
    ]
    infer += ["--sampler_args", "position=0.6"]
    sampler = PLUGINS / "hyimg-midpoint" / "hyimg_midpoint.py"
    code, _, err = hyimg(
        *infer, "--plugin", sampler, "--sampler", "midpoint", "--save_path", tmp_path / "a.png"
    )
    assert code == 0, err
    code, _, err = hyimg(*infer, "--sampler", "midpoint", "--save_path", tmp_path / "b.png")
    assert code == 2, "without the plugin there is no such sampler"
    assert "`midpoint` is unknown" in err


MARK = "from hyimg.hookspecs import hookimpl\n@hookimpl\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_this_name", ["cannot be imported: ModuleNotFoundError", "bad.py"]),
        (MARK + "def hyimg_loses(): return {}", ["`hyimg_loses`, which is not a hook", "hyimg_losses"]),
        (
            MARK + "def hyimg_losses(): return {'L2': print}",
            ["provides `L2`", "`hyimg.plugins.builtins` already has"],
        ),
        (MARK + "def hyimg_losses(): return ['l3']", ["the plugin `bad`", "bad.py", "hook `hyimg_losses`"]),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_clear_error(hyimg, cached_dataset, tmp_path, text, words):
    file = tmp_path / "bad.py"
    file.write_text(text, encoding="utf-8")
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "out"]
    code, _, err = hyimg(*train, "--plugin", file)
    assert code == 2
    for word in words:
        assert word in err


def test_events_reach_a_plugin_in_order(hyimg, cached_dataset, tmp_path):
    file, log = tmp_path / "watch.py", tmp_path / "log.txt"
    file.write_text(
        "from hyimg.hookspecs import hookimpl\n"
        f"def log(*words):\n    open({str(log)!r}, 'a').write(' '.join(map(str, words)) + '\\n')\n"
        "@hookimpl\ndef hyimg_run_start(run):\n    log('start', run.schedule.max_steps)\n"
        "@hookimpl\ndef hyimg_step_end(step, loss_B):\n    log('step', step, len(loss_B))\n"
        "@hookimpl\ndef hyimg_epoch_end(epoch):\n    log('epoch', epoch)\n"
        "@hookimpl\ndef hyimg_run_end(run):\n    log('end', run.step, run.saved[-1].name)\n"
    )
    train = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "out"]
    code, _, err = hyimg(*train, "--max_train_epochs", "2", "--plugin", file)
    assert code == 0, err
    lines = log.read_text().splitlines()
    assert lines[0] == "start 8"
    assert [line.split()[1] for line in lines if line.startswith("step")] == list("12345678")
    assert sum(int(line.split()[2]) for line in lines if line.startswith("step")) == 10, "five images, twice"
    assert lines[5] == "epoch 1"
    assert lines[-2:] == ["epoch 2", "end 8 lora.safetensors"]
