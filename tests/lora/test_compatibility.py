"""Our files in the hands of other programs: diffusers with PEFT, and what was measured of the others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.lora.files.compatibility import Compatibility, compatibility
from hyimg.lora.files.conversion import convert
from hyimg.lora.files.foreign import METADATA_KEY
from hyimg.lora.files.stored import LoRAFile
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT, TextCondition
from hyimg.model.loading import load_dit

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def _judge(path: Path) -> dict[str, Compatibility]:
    return {found.loader.name: found for found in compatibility(LoRAFile.open(path, allow_partial=True))}


@pytest.fixture
def diffusers_model(lora_arch: DiTArch) -> Any:
    """diffusers' own model of the size that the golden LoRA files are for."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the test extra")
    pytest.importorskip("peft", reason="peft is in the test extra")
    torch.manual_seed(0)
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=lora_arch.latent_channels,
        out_channels=lora_arch.latent_channels,
        num_attention_heads=lora_arch.heads,
        attention_head_dim=lora_arch.head_dim,
        num_layers=lora_arch.num_double,
        num_single_layers=lora_arch.num_single,
        num_refiner_layers=lora_arch.refiner_depth,
        text_embed_dim=lora_arch.text_dim,
        text_embed_2_dim=lora_arch.byt5_dim,
        rope_axes_dim=(16, 16),
    ).eval()


def _theirs(model: Any, latent: Tensor, timestep: Tensor, text: TextCondition) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(
            latent,
            timestep,
            text.text_BTD,
            text.text_mask_BT,
            encoder_hidden_states_2=text.byt5_BSE,
            encoder_attention_mask_2=text.byt5_mask_BS,
            return_dict=False,
        )[0]
    return out


@pytest.mark.filterwarnings("ignore")
def test_diffusers_applies_every_module_of_a_converted_file(
    golden: Path, tmp_path: Path, load: Any, products: Any, diffusers_model: Any
) -> None:
    model = diffusers_model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    convert(golden / "lora_kohya.safetensors", tmp_path / "lora.safetensors", to="diffusers")
    model.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    expected = products(load(golden / "lora_diffusers.safetensors")[0])
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"{module.removeprefix('transformer.')}.weight" for module in expected}
    for module, delta in expected.items():
        name = f"{module.removeprefix('transformer.')}.weight"
        # A delta of about 0.01 read off weights of about 0.1: float32 rounding of the sum
        torch.testing.assert_close(model.state_dict()[name] - before[name], delta, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_renders_as_we_do_with_a_converted_file(
    golden: Path, tmp_path: Path, load: Any, diffusers_model: Any, lora_arch: DiTArch, inputs: Any, dora: bool
) -> None:
    latent, timestep, text = inputs
    text = TextCondition(
        text.text_BTD, text.text_mask_BT, torch.randn(2, 3, lora_arch.byt5_dim), torch.ones(2, 3).bool()
    )
    save_file(diffusers_model.state_dict(), tmp_path / "dit.safetensors")
    dit: DiT = load_dit(tmp_path / "dit.safetensors", dtype=torch.float32)
    state, _ = load(golden / "lora_kohya.safetensors")
    if dora:
        names = [name.removesuffix(".lora_up.weight") for name in state if name.endswith(".lora_up.weight")]
        state |= {f"{name}.dora_scale": torch.rand(len(state[f"{name}.lora_up.weight"]), 1) for name in names}
    save_file(state, tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", tmp_path / "lora.safetensors", to="diffusers")
    base = _theirs(diffusers_model, latent, timestep, text)
    diffusers_model.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="transformer")
    theirs = _theirs(diffusers_model, latent, timestep, text)
    network = AdapterNetwork.read(tmp_path / "kohya.safetensors", dit.arch)
    network.attach(dit)
    with torch.no_grad():
        ours = dit(latent, timestep, text)
    assert (theirs - base).abs().max() > 0.01
    # float32 rounding of two orders of operations, outputs of order 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    # and back: the file that diffusers has loaded means the same to us
    convert(tmp_path / "lora.safetensors", tmp_path / "back.safetensors", to="kohya")
    network.detach(dit)
    AdapterNetwork.read(tmp_path / "back.safetensors", dit.arch).attach(dit)
    with torch.no_grad():
        torch.testing.assert_close(dit(latent, timestep, text), ours, rtol=0, atol=1e-5)


def _comfyui_names(golden: Path) -> set[str]:
    """The names that ComfyUI's loader looks for, as `model_lora_keys_unet` builds them from its weights."""
    weights = json.loads((golden / "keymap.json").read_text())["weights"]
    modules = [w["comfyui"].removesuffix(".weight") for w in weights if w["comfyui"].endswith(".weight")]
    return {"lora_unet_" + name.replace(".", "_") for name in modules} | {
        f"diffusion_model.{name}" for name in modules
    }


@pytest.mark.parametrize("source", ["kohya", "dpipe", "diffusers"])
@pytest.mark.parametrize("target", ["comfy", "peft"])
def test_comfyuis_key_map_leaves_no_tensor_of_a_converted_file_over(
    golden: Path, tmp_path: Path, source: str, target: str
) -> None:
    src, dst = golden / f"lora_{source}.safetensors", tmp_path / "dst.safetensors"
    if (source, target) == ("dpipe", "peft"):
        dst = src
    else:
        convert(src, dst, to=target)
    names = _comfyui_names(golden)
    roles = re.compile(r"\.(lora_(up|down)\.weight|lora_[AB]\.weight|alpha)$")
    tensors = read_header(dst).tensors
    assert {name for name in tensors if roles.sub("", name) not in names} == set()
    assert len({roles.sub("", name) for name in tensors}) == 24


# What `check` says of them


def test_verdicts_agree_with_what_was_measured_of_the_programs(
    golden: Path, tmp_path: Path, load: Any
) -> None:
    measured = json.loads((golden / "lora_loading.json").read_text())
    files = {name: golden / f"lora_{name}.safetensors" for name in measured["comfyui"] if "+" not in name}
    strange = "diffusion_model.+original names (not converted)"
    files[strange] = tmp_path / "strange.safetensors"
    save_file(_with_original_names(golden, load), files[strange])
    for name, path in files.items():
        found = _judge(path)
        comfyui = measured["comfyui"][name]
        assert found["comfyui"].num_dropped_tensors == comfyui["keys_not_loaded"], name
        assert len(found["comfyui"].applied) == comfyui["weights_patched"], name
        if "sd_scripts" in measured and name in measured["sd_scripts"]:
            assert len(found["sd_scripts"].applied) == measured["sd_scripts"][name]["merged_weights"], name
        loads = measured["diffusion_pipe"].get(name, "RuntimeError") == "loads all"
        assert found["diffusion_pipe"].loads == ("all" if loads else "none"), name
        theirs = measured["diffusers"].get(name)
        if theirs is not None:
            loads = isinstance(theirs, Mapping) and theirs["weights_changed"] == theirs["expected"]
            assert found["diffusers"].loads == ("all" if loads else "none"), name


def test_the_modules_that_comfyui_was_seen_to_drop_are_named(golden: Path) -> None:
    measured = json.loads((golden / "lora_loading.json").read_text())["comfyui"]["kohya"]["dropped_modules"]
    dropped = _judge(golden / "lora_kohya.safetensors")["comfyui"].dropped
    assert sorted("lora_unet_" + name.replace(".", "_") for name in dropped) == sorted(measured)
    assert all("knows `lora_unet_" in reason for reason in dropped.values())


def _with_original_names(golden: Path, load: Any) -> dict[str, Tensor]:
    """diffusion-pipe's file under the model's own names, as it has them before it renames for ComfyUI."""
    state, _ = load(golden / "lora_dpipe.safetensors")
    weights = json.loads((golden / "keymap.json").read_text())["weights"]
    original = {w["comfyui"].removesuffix(".weight"): w["original"].removesuffix(".weight") for w in weights}
    renamed = {}
    for name, tensor in state.items():
        module, half = name.removeprefix("diffusion_model.").rsplit(".lora_", 1)
        renamed[f"diffusion_model.{original[module]}.lora_{half}"] = tensor
    return renamed


def test_strength_that_a_program_gets_wrong_is_told(golden: Path, tmp_path: Path, load: Any) -> None:
    path = tmp_path / "lora.safetensors"
    diffusers, _ = load(golden / "lora_diffusers.safetensors")
    key = "transformer.transformer_blocks.0.attn.to_out.0"
    save_file(diffusers | {f"{key}.alpha": torch.tensor(2.0)}, path)
    verdict = _judge(path)["diffusers"]
    assert (verdict.loads, len(verdict.applied)) == ("part", 24)
    assert "`.alpha` is ignored" in verdict.notes[0]
    peft, _ = load(golden / "lora_dpipe.safetensors")
    save_file(peft, path, {METADATA_KEY: json.dumps({"transformer.lora_alpha": 1})})
    assert "alpha in the metadata is ignored" in _judge(path)["comfyui"].notes[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
    save_file(peft, path)  # of ranks that differ
    ranks = {len(tensor) for name, tensor in peft.items() if "lora_A" in name}
    low, high = min(ranks) / 6, max(ranks) / 6
    (note,) = _judge(path)["comfyui"].notes
    assert note.startswith(
        f"alpha in `adapter_config.json` is ignored, so the strength is {low:.4g} to {high:.4g} times"
    )
    save_file(diffusers, path)
    assert "`adapter_config.json` is ignored" in _judge(path)["diffusers"].notes[0]
    (tmp_path / "adapter_config.json").unlink()
    kohya, _ = load(golden / "lora_kohya.safetensors")
    save_file(kohya | {f"{QKV}.dora_scale": torch.ones(288, 1)}, path)
    found = _judge(path)
    assert "without its magnitudes" in found["sd_scripts"].notes[0]
    assert found["comfyui"].notes == ()
    to_out = f"{key}.lora_magnitude_vector"
    save_file(diffusers | {to_out: torch.ones(96)}, path)
    assert "are turned into one" in _judge(path)["diffusers"].notes[0]
