"""Checkpoints that other tools quantised to fp8: every form in every name layout, and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.checkpoints.header_check import open_dit
from hyimg.checkpoints.names import dit_key_map
from hyimg.errors import HyimgError
from hyimg.model.dit import DiT
from hyimg.model.loading import WeightPlacement, init_random, load_dit

E4M3 = torch.float8_e4m3fn
LAYOUTS = ("original", "split", "comfyui", "diffusers")
FC1 = "double_blocks.1.img_mlp.fc1"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    model = DiT(DIT_TINY)
    init_random(model, seed=1)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def parts(golden_json: Callable[[str], Any]) -> Callable[[str, str], list[tuple[str, float, float]]]:
    """For a layout and an original name: the tensors that it is made of, with their share of the rows."""
    rows = {row["original"]: row for row in golden_json("keymap")["weights"]}

    def split(name: str) -> list[tuple[str, float, float]]:
        # As `hyimage/models/hunyuan/modules/hunyuanimage_dit.py` cuts the tensors; MLP 4 times as wide
        if "attn_qkv" in name and not name.startswith("txt_in"):
            return [(name.replace("qkv", x), i / 3, (i + 1) / 3) for i, x in enumerate("qkv")]
        if "linear1" in name:
            cuts = zip(("q", "k", "v", "mlp"), (0, 1, 2, 3), (1, 2, 3, 7), strict=True)
            return [(name.replace("linear1", f"linear1_{x}"), start / 7, end / 7) for x, start, end in cuts]
        return [(name.replace("linear2", "linear2.fc"), 0, 1)]

    def parts_of(layout: str, name: str) -> list[tuple[str, float, float]]:
        if layout == "split":
            return split(name)
        if layout != "diffusers":
            return [(rows[name][layout], 0, 1)]
        sources = rows[name]["diffusers"]
        total = sources[-1].get("rows", [0, 1])[1]
        return [
            (part["name"], *(end / total for end in part["rows"])) if "rows" in part else (part["name"], 0, 1)
            for part in sources
        ]

    return parts_of


def is_block_matrix(name: str, weight: Tensor) -> bool:
    return name.startswith(("double_", "single_")) and weight.dim() == 2


def scales_of(weight: Tensor, form: str) -> Tensor:
    """The largest value over 448, for a tensor, a row or each 16 values of a row."""
    groups = {"tensor": 1, "row": len(weight), "block": weight.numel() // 16}[form]
    scale = weight.reshape(groups, -1).abs().amax(dim=1) / 448
    return scale.view({"tensor": (), "row": (-1, 1), "block": (len(weight), -1, 1)}[form])


def quantise(weight: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and what they stand for, in float32."""
    scale = scales_of(weight, form)
    grouped = weight.reshape(scale.numel(), -1)
    q = (grouped / scale.view(-1, 1)).clamp(-448, 448).to(E4M3)
    return q.view(weight.shape), scale, (q.float() * scale.view(-1, 1)).view(weight.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        ("tensor", "weight_scale"),
        ("tensor", "scale_weight"),
        ("row", "scale_weight"),
        ("block", "scale_weight"),
    ],
)
def test_scaled_weights_are_value_times_scale_in_every_layout(
    tmp_path: Path,
    weights: dict[str, Tensor],
    parts: Callable[[str, str], list[tuple[str, float, float]]],
    layout: str,
    form: str,
    suffix: str,
) -> None:
    file: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=E4M3)} if suffix == "scale_weight" else {}
    expected = {}
    for name, weight in weights.items():
        stored = torch.cat(weight.chunk(2)[::-1]) if swapped(layout, name) else weight
        made = []
        for part, start, end in parts(layout, name):
            rows = stored[round(start * len(stored)) : round(end * len(stored))]
            if not is_block_matrix(name, weight):
                file[part] = rows.contiguous()
                continue
            module = part.removesuffix(".weight")
            file[part], file[f"{module}.{suffix}"], dequantised = quantise(rows, form)
            file[f"{module}.input_scale" if suffix == "weight_scale" else f"{module}.scale_input"] = (
                torch.ones(())
            )
            file[f"{module}.comfy_quant"] = torch.zeros(27, dtype=torch.uint8)
            made.append(dequantised)
        expected[name] = torch.cat(made) if made else weight
    path = tmp_path / "dit.safetensors"
    save_file(file, path)

    assert open_dit(path).arch == DIT_TINY
    assert open_dit(path).quantization == f"e4m3 with `{suffix}`"
    state = load_dit(path, dtype=torch.float32).state_dict()
    for name in weights:
        assert torch.equal(state[name], expected[name]), name


def swapped(layout: str, name: str) -> bool:
    return layout == "diffusers" and name.startswith("final_layer.adaLN")


def test_split_names_of_plain_weights_are_read_too(
    tmp_path: Path,
    weights: dict[str, Tensor],
    parts: Callable[[str, str], list[tuple[str, float, float]]],
) -> None:
    split = {
        part: weight[round(start * len(weight)) : round(end * len(weight))].contiguous()
        for name, weight in weights.items()
        for part, start, end in parts("split", name)
    }
    save_file(split, tmp_path / "dit.safetensors")
    state = load_dit(tmp_path / "dit.safetensors").state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert dit_key_map(split)["single_blocks.2.linear2.bias"].parts == ("single_blocks.2.linear2.fc.bias",)


def test_a_placement_gets_e4m3_values_and_their_scales(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    file = dict(weights)
    for form, name in zip(
        ("tensor", "row", "block"), ("linear1", "linear2", "modulation.linear"), strict=True
    ):
        q, scale, _ = quantise(weights[f"single_blocks.0.{name}.weight"], form)
        file[f"single_blocks.0.{name}.weight"], file[f"single_blocks.0.{name}.scale_weight"] = q, scale
    save_file(file, tmp_path / "dit.safetensors")
    seen = {}

    class Recording(WeightPlacement):
        def put(self, model: nn.Module, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
            if tensor.dtype == E4M3:
                assert scale is not None
                seen[name] = (
                    tuple(scale.shape),
                    scale.dtype,
                    torch.equal(tensor.float(), file[name].float()),
                )
            else:
                assert scale is None
            super().put(model, name, tensor, scale)

    load_dit(tmp_path / "dit.safetensors", placement=Recording())
    assert seen == {
        "single_blocks.0.linear1.weight": ((1,), torch.float32, True),
        "single_blocks.0.linear2.weight": ((64, 1), torch.float32, True),
        "single_blocks.0.modulation.linear.weight": ((192, 4, 1), torch.float32, True),
    }


def test_e4m3_weights_without_scales_are_read(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "dit.safetensors"
    save_file({name: weight.to(E4M3) for name, weight in weights.items()}, path)
    assert open_dit(path).quantization == "e4m3 without scales"
    model = load_dit(path)
    assert model.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name].to(E4M3).bfloat16()), name


def test_a_separate_file_of_scales_is_found_and_missed(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    file, scales, expected = dict(weights), {}, dict(weights)
    for name, weight in weights.items():
        if is_block_matrix(name, weight):
            file[name], scales[name.removesuffix(".weight")], expected[name] = quantise(weight, "tensor")
    path, scale_path = tmp_path / "dit_fp8.safetensors", tmp_path / "dit_fp8_scale.safetensors"
    save_file(file, path)
    with pytest.raises(HyimgError, match="has fp8 weights that were scaled, but no scales") as error:
        open_dit(path)
    assert "`_scale`" in str(error.value.hint)
    save_file(scales, scale_path)
    assert open_dit(path).arch == DIT_TINY
    assert open_dit(path).quantization == "e4m3 with scales"
    state = load_dit(path, dtype=torch.float32).state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())


@pytest.fixture
def scaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    file = dict(weights)
    for name, weight in weights.items():
        if is_block_matrix(name, weight):
            q, scale, _ = quantise(weight, "tensor")
            file[name], file[f"{name}_scale"] = q, scale
    return file


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({f"{FC1}.weight_scale": None}, rf"`{FC1}.weight` is F8_E4M3 and its scales are missing"),
        ({f"{FC1}.weight_scale": torch.ones(4, 1)}, rf"`{FC1}.weight_scale` has the shape \[4, 1\]"),
        (
            {f"{FC1}.weight_scale": torch.ones(256, 3, 1)},
            r"the shape \[256, 3, 1\], which for \[256, 64\] is",
        ),
        (
            {f"{FC1}.weight_scale": torch.ones((), dtype=torch.uint8)},
            rf"`{FC1}.weight_scale` is U8, and scales",
        ),
        ({f"{FC1}.weight": torch.zeros(256, 64)}, rf"`{FC1}.weight_scale` is not known"),
        ({f"{FC1}.weight": None}, rf"`{FC1}.weight` is missing"),
        ({"img_in.weight_scale": torch.ones(())}, r"`img_in.weight_scale` is not known"),
    ],
)
def test_wrong_scales_are_listed(
    tmp_path: Path, scaled: dict[str, Tensor], change: Mapping[str, Tensor | None], problem: str
) -> None:
    file = {name: tensor for name, tensor in {**scaled, **change}.items() if tensor is not None}
    save_file(file, tmp_path / "dit.safetensors")
    with pytest.raises(HyimgError, match=problem):
        open_dit(tmp_path / "dit.safetensors")


@pytest.mark.parametrize(
    ("key_tensors", "problem"),
    [
        (
            (torch.zeros(64, 64), None),
            "only some of the parts of `{}` are F8_E4M3",
        ),
        (
            (torch.zeros(64, 64).to(E4M3), torch.ones(64, 2, 1)),
            "the parts of `{}` have scales for blocks of different sizes",
        ),
    ],
)
def test_incompatible_parts_of_a_tensor_are_listed(
    tmp_path: Path,
    weights: dict[str, Tensor],
    parts: Callable[[str, str], list[tuple[str, float, float]]],
    key_tensors: tuple[Tensor, Tensor | None],
    problem: str,
) -> None:
    file = {}
    for name, weight in weights.items():
        for part, start, end in parts("split", name):
            file[part] = weight[round(start * len(weight)) : round(end * len(weight))].contiguous()
    module = "double_blocks.0.img_attn_"
    for part in "qkv":
        q, scale, _ = quantise(file[f"{module}{part}.weight"], "block")
        file[f"{module}{part}.weight"], file[f"{module}{part}.scale_weight"] = q, scale
    file[f"{module}k.weight"], scale = key_tensors
    if scale is None:
        del file[f"{module}k.scale_weight"]
    else:
        file[f"{module}k.scale_weight"] = scale
    save_file(file, tmp_path / "dit.safetensors")
    with pytest.raises(HyimgError, match=problem.format(f"{module}qkv.weight")):
        open_dit(tmp_path / "dit.safetensors")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (
            json.dumps({"layers": {FC1: {"format": "nvfp4"}}}),
            "quantised as `nvfp4`, and only `float8_e4m3fn`",
        ),
        ("{]", "`_quantization_metadata` of .* cannot be read"),
        (json.dumps({"layers": {FC1: {"format": "float8_e4m3fn"}}}), None),
    ],
)
def test_other_quantisations_are_refused_by_name(
    tmp_path: Path, scaled: dict[str, Tensor], metadata: str, problem: str | None
) -> None:
    path = tmp_path / "dit.safetensors"
    save_file(scaled, path, metadata={"_quantization_metadata": metadata})
    if problem is None:
        assert open_dit(path).arch == DIT_TINY
        return
    with pytest.raises(HyimgError, match=problem):
        open_dit(path)
