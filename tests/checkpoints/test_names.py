"""Foreign tensor names against tests/golden/keymap.json, the list of Linears against lora_modules.json."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest

from hyimg.checkpoints.architecture import DIT_2_1
from hyimg.checkpoints.names import Source, dit_key_map, linear_modules, vae_key_map

GoldenJson = Callable[[str], Any]


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("layout", ["original", "comfyui"])
def test_original_and_comfyui_names_are_mapped_one_to_one(
    golden_json: GoldenJson, layout: str, prefix: str
) -> None:
    keymap = golden_json("keymap")
    rows = keymap["weights"] + keymap["extra"]
    expected = {row["original"]: Source((prefix + row[layout],)) for row in rows}
    assert dit_key_map([prefix + row[layout] for row in rows]) == expected


def test_diffusers_names_are_mapped_to_row_ranges_of_the_original(golden_json: GoldenJson) -> None:
    keymap = golden_json("keymap")
    rows = keymap["weights"] + keymap["extra"]
    shapes = {}
    for row in rows:
        for part in row["diffusers"]:
            start, end = part.get("rows", (0, row.get("shape", [1])[0]))
            shapes[part["name"]] = (end - start, *row.get("shape", [1])[1:])
    key_map = dit_key_map(list(shapes))
    assert set(key_map) == {row["original"] for row in rows}
    for row in rows:
        source = key_map[row["original"]]
        assert list(source.parts) == [part["name"] for part in row["diffusers"]]
        assert source.swap_halves == ("row_order" in row["diffusers"][0])
        if len(source.parts) > 1:
            ends = accumulate((shapes[part][0] for part in source.parts), initial=0)
            assert [part["rows"] for part in row["diffusers"]] == [list(pair) for pair in pairwise(ends)]
        if "shape" in row:
            assert source.shape(shapes) == tuple(row["shape"])


def test_unknown_names_map_to_themselves_and_absent_parts_are_listed() -> None:
    names = [
        "transformer_blocks.7.attn.to_q.weight",
        "transformer_blocks.7.attn.to_x.weight",
        "proj_out.bias",
    ]
    assert dit_key_map(names) == {
        "double_blocks.7.img_attn_qkv.weight": Source(
            tuple(f"transformer_blocks.7.attn.to_{x}.weight" for x in "qkv")
        ),
        "transformer_blocks.7.attn.to_x.weight": Source(("transformer_blocks.7.attn.to_x.weight",)),
        "final_layer.linear.bias": Source(("proj_out.bias",)),
    }


def test_vae_names_with_a_prefix_are_mapped_to_the_bare_ones(golden_json: GoldenJson) -> None:
    names = list(golden_json("vae_keys")["keys"])
    for prefix in ("", "vae.", "first_stage_model."):
        expected = {name: Source((prefix + name,)) for name in names}
        assert vae_key_map([prefix + name for name in names]) == expected


def test_linear_modules_are_the_reference_tools_320_in_order(golden_json: GoldenJson) -> None:
    found = [(m.name, m.in_features, m.out_features) for m in linear_modules(DIT_2_1)]
    golden = golden_json("lora_modules")["modules"]
    assert found == [(row["module"], row["in_features"], row["out_features"]) for row in golden]


def test_headers_architectures_and_names_need_no_torch() -> None:
    modules = "hyimg.checkpoints.header_check, hyimg.checkpoints.names"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
