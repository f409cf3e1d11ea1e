"""`hyimg check`: a LoRA file in brief, and what merging it into fp8 would leave."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyimg.lora.files.conversion import save_lora
from hyimg.lora.network import AdapterNetwork
from hyimg.model.loading import load_dit


@pytest.fixture
def lora(model, tmp_path):
    """A LoRA of the tiny model with updates a tenth as large as its weights."""
    dit = load_dit(model.dit, dtype=torch.float32)
    network = AdapterNetwork.create(dit, rank=4, alpha=2.0, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for module, adapter in network.adapters():
            adapter.lora_up.weight.normal_()
            weight = dit.get_parameter(f"{module.name}.weight")
            adapter.lora_up.weight.mul_(0.1 * weight.norm() / adapter.delta().norm())
    save_lora(tmp_path / "lora.safetensors", network.state())
    return tmp_path / "lora.safetensors"


def test_a_lora_in_brief(hyimg, lora):
    code, out, err = hyimg("check", lora, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["all"]["modules"] == 32 == sum(kind["modules"] for kind in found["kinds"])
    assert found["all"]["ranks"] == {"4": 32}
    assert found["all"]["alphas"] == {"2": 32}
    assert found["formats"] == ["kohya"]
    assert found["not_finite"] == []
    squares = sum(kind["norm"] ** 2 for kind in found["kinds"])
    assert found["all"]["norm"] == pytest.approx(squares**0.5)
    assert {kind["kind"] for kind in found["kinds"]} >= {"linear1", "img_attn_qkv", "txt_mlp.fc1"}
    assert "fp8" not in found["all"]
    code, out, err = hyimg("check", lora)
    assert (code, err) == (0, "")
    assert "linear1" in out
    assert "fp8" not in out


def test_what_fp8_leaves_is_told_by_layer_kind(hyimg, lora):
    code, out, err = hyimg("check", lora, "--dit", "{dit}", "--fp8", "--json", "--device", "cpu")
    assert code == 0, err
    found = json.loads(out)
    for kind in (found["all"], *found["kinds"]):
        assert 0.85 < kind["fp8"]["survives"] < 0.99
        assert 0.1 < kind["fp8"]["relative_error"] < 0.5
    code, out, err = hyimg("check", lora, "--dit", "{dit}", "--fp8", "--device", "cpu")
    assert code == 0, err
    assert "survives fp8" in out
    assert "% of the update would survive merging into an fp8 model" in " ".join(out.split())


def test_modules_with_nan_are_named_and_left_out_of_the_sums(hyimg, lora):
    state = load_file(lora)
    state["lora_unet_single_blocks_2_linear2.lora_up.weight"][5, 1] = torch.nan
    save_file(state, lora)
    code, out, err = hyimg("check", lora, "--dit", "{dit}", "--fp8", "--json", "--device", "cpu")
    assert code == 0
    found = json.loads(out)
    assert found["not_finite"] == ["single_blocks.2.linear2"]
    assert found["all"]["modules"] == 31
    assert found["all"]["norm"] > 0
    assert "warning: NaN or infinite values in 1 module of" in err
    assert "`single_blocks.2.linear2`" in err


def test_a_dora_by_columns_is_reported_and_not_refused(hyimg, lora):
    state = load_file(lora)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    state[f"{name}.dora_scale"] = torch.ones(1, state[f"{name}.lora_down.weight"].shape[1])
    save_file(state, lora)
    code, out, err = hyimg("check", lora, "--json")
    assert code == 0, err
    assert json.loads(out)["adapters"] == {"DoRA": 1, "LoRA": 31}
    assert "1 module of" in err
    assert "DoRA by input columns" in err


def test_what_cannot_be_checked_is_refused_in_a_sentence(hyimg, lora, model, tmp_path, golden):
    for arguments, words in (
        (("check", lora, "--fp8"), "`--fp8` needs the base model"),
        (("check", model.dit), "is not a LoRA but a diffusion transformer"),
        (("check", tmp_path / "none.safetensors"), "none.safetensors"),
        (("check", golden / "lora_kohya.safetensors", "--dit", "{dit}"), "a LoRA for a model of width 96"),
        (("check", lora, "--dit", "{vae}"), "is a VAE"),
    ):
        code, out, err = hyimg(*arguments)
        assert (code, out) == (2, ""), err
        assert words in err
