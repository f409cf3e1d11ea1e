"""The table of names against the full-size key map and the golden LoRA files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyimg.checkpoints.architecture import DIT_2_1
from hyimg.checkpoints.names import BLOCK_LINEARS, BlockLinear, linear_modules
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.lora.files.formats import FORMATS, lora_name, matching_formats, parse_key

GOLDEN_FORMATS = {
    "kohya": ("kohya",),
    "comfy": ("comfy",),
    "comfy_reversed": ("kohya",),
    "dpipe": ("peft",),
    "diffusers": ("diffusers",),
}


def _targets() -> list[tuple[BlockLinear, int]]:
    counts = {"double_blocks": DIT_2_1.num_double, "single_blocks": DIT_2_1.num_single}
    return [(target, index) for target in BLOCK_LINEARS for index in range(counts[target.block])]


def test_every_linear_of_the_blocks_is_a_target_and_nothing_else() -> None:
    named = {f"{target.block}.{index}.{target.original}" for target, index in _targets()}
    assert named == {module.name for module in linear_modules(DIT_2_1)}


def test_spellings_and_row_ranges_are_those_of_the_full_size_key_map(golden: Path) -> None:
    weights = {w["original"]: w for w in json.loads((golden / "keymap.json").read_text())["weights"]}
    widths = (DIT_2_1.hidden, DIT_2_1.mlp_hidden)
    for target, index in _targets():
        weight = weights[f"{target.block}.{index}.{target.original}.weight"]
        peft, diffusers = FORMATS["peft"], FORMATS["diffusers"]
        assert peft.module_name(target, index) == f"diffusion_model.{weight['comfyui']}".removesuffix(
            ".weight"
        )
        start, expected = 0, []
        for part, width in enumerate(target.part_widths):
            name = diffusers.module_name(target, index, part).removeprefix("transformer.")
            end = start + width[0] * widths[0] + width[1] * widths[1]
            expected.append({"name": f"{name}.weight", "rows": [start, end]})
            start = end
        if len(expected) == 1:
            del expected[0]["rows"]
        assert weight["diffusers"] == expected
        assert weight["shape"][0] == start
        assert weight["shape"][1] == target.in_width[0] * widths[0] + target.in_width[1] * widths[1]


def test_comfyui_has_a_module_for_every_name_of_the_comfy_form(golden: Path) -> None:
    # ComfyUI builds its keys for a model as `lora_unet_` + its own weight names with underscores
    weights = json.loads((golden / "keymap.json").read_text())["weights"]
    accepted = {"lora_unet_" + w["comfyui"].removesuffix(".weight").replace(".", "_") for w in weights}
    names = {FORMATS["comfy"].module_name(target, index) for target, index in _targets()}
    assert len(names) == 320
    assert names <= accepted
    assert len(accepted & {lora_name(module.name) for module in linear_modules(DIT_2_1)}) == 160


@pytest.mark.parametrize(("file", "formats"), GOLDEN_FORMATS.items())
def test_the_form_of_a_golden_file_is_found_from_its_names(
    golden: Path, file: str, formats: tuple[str, ...]
) -> None:
    keys = [parse_key(text) for text in read_header(golden / f"lora_{file}.safetensors").tensors]
    assert all(keys)
    assert tuple(matching_formats(key for key in keys if key)) == formats


def test_attention_modules_are_spelled_alike_by_two_tools() -> None:
    key = parse_key("lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight")
    assert key is not None
    assert (key.module, key.part, key.role) == ("double_blocks.7.img_attn_qkv", None, "down")
    assert matching_formats([key]) == ["kohya", "comfy"]


@pytest.mark.parametrize(
    ("text", "module", "part"),
    [
        ("diffusion_model.double_blocks.3.img_mlp.fc1.lora_A.weight", "double_blocks.3.img_mlp.fc1", None),
        ("transformer.single_blocks.39.linear1.lora_down.weight", "single_blocks.39.linear1", None),
        ("single_transformer_blocks.2.proj_mlp.lora_B.weight", "single_blocks.2.linear1", 3),
        ("base_model.model.transformer_blocks.0.attn.add_k_proj.lora_A.default.weight", "double_blocks.0.txt_attn_qkv", 1),  # noqa: E501
        ("lora_transformer_transformer_blocks_1_ff_net_0_proj.alpha", "double_blocks.1.img_mlp.fc1", None),
        ("base_model.model.diffusion_model.single_blocks.0.linear1.lora_A.my_cat.weight", "single_blocks.0.linear1", None),  # noqa: E501
        ("transformer.transformer_blocks.0.attn.to_q.lora.down.weight", "double_blocks.0.img_attn_qkv", 0),
        ("transformer_blocks.0.attn.processor.to_v_lora.up.weight", "double_blocks.0.img_attn_qkv", 2),
        ("diffusion_model.double_blocks.0.txt_attn.proj.lora_linear_layer.up.weight", "double_blocks.0.txt_attn_proj", None),  # noqa: E501
        ("lycoris_single_transformer_blocks_0_attn_to_k.lokr_w1", "single_blocks.0.linear1", 1),
        ("diffusion_model.double_blocks.0.img_mod.lin.lora_B", "double_blocks.0.img_mod.linear", None),
        ("model.double_blocks.0.txt_attn_k.lora_A.default.weight", "double_blocks.0.txt_attn_qkv", 1),
        ("transformer.transformer_blocks.3.norm1.linear.lora_magnitude_vector", "double_blocks.3.img_mod.linear", None),
    ],
)  # fmt: skip
def test_names_of_other_tools_are_understood(text: str, module: str, part: int | None) -> None:
    key = parse_key(text)
    assert key is not None
    assert (key.module, key.part) == (module, part)
    assert matching_formats([key]) == [] or "single_" in text or "magnitude" in text


@pytest.mark.parametrize(
    "text",
    [
        "lora_unet_input_blocks_1_1_proj_in.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_mid.weight",
        "double_blocks.0.img_attn_qkv.weight",
        "lora_unet_final_layer_linear.lora_up.weight",
        "diffusion_model.double_blocks.0.img_mod.lin.lora_B.bias",
        "diffusion_model.double_blocks.0.img_mod.lin.diff_b",
    ],
)
def test_names_of_no_module_are_not(text: str) -> None:
    assert parse_key(text) is None
