"""Files of other tools: their precisions, their configuration, their parts of other models; and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyimg.checkpoints.header_check import open_dit
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.errors import HyimgError
from hyimg.lora.files.conversion import convert, merge, read_adapters, read_lora, require_finite
from hyimg.lora.files.foreign import METADATA_KEY
from hyimg.lora.files.stored import LoRAFile

Load = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
Products = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

FILE_OF = {"kohya": "lora_kohya", "comfy": "lora_comfy", "peft": "lora_dpipe", "diffusers": "lora_diffusers"}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
STEM = "double_blocks.0.img_attn"


def _adapter(stem: str, rank: int, rows: int = 8, columns: int = 8) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, columns),
        f"{stem}.lora_B.weight": torch.randn(rows, rank),
    }


# Precisions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("target", ["comfy", "peft", "diffusers"])
def test_every_precision_keeps_its_deltas(
    golden: Path, tmp_path: Path, load: Load, dtype: torch.dtype, target: str
) -> None:
    state, _ = load(golden / "lora_kohya.safetensors")
    narrow = {name: t if name.endswith("alpha") else (t * 4).to(dtype) for name, t in state.items()}
    src, dst = tmp_path / "src.safetensors", tmp_path / "dst.safetensors"
    save_file(narrow, src)
    convert(src, dst, to=target)
    expected = dict(read_adapters(src))
    assert len(expected) == 24
    for name, update in read_adapters(dst):
        theirs = expected[name]
        torch.testing.assert_close(
            update.delta_rows(slice(None)), theirs.delta_rows(slice(None)), rtol=1e-5, atol=1e-5
        )
    sum_of = {tensor.dtype for tensor in load(dst)[0].values()}
    assert dtype in sum_of, "what is only renamed stays as narrow as it was"
    require_finite(src, read_lora(src))


# Configuration


def test_alpha_for_single_modules_in_pefts_configuration_is_honoured(
    tmp_path: Path, load: Load, products: Products
) -> None:
    one, ten = (f"transformer.single_transformer_blocks.{i}.proj_out" for i in (1, 11))
    state = _adapter(one, 4, 8, 40) | _adapter(ten, 4, 8, 40)
    pattern = {"1.proj_out": 2}  # the end of a name, from a dot on
    config = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.alpha_pattern": pattern}
    save_file(state, tmp_path / "src.safetensors", {METADATA_KEY: json.dumps(config)})
    convert(tmp_path / "src.safetensors", tmp_path / "dst.safetensors", to="kohya")
    written = load(tmp_path / "dst.safetensors")[0]
    assert float(written["lora_unet_single_blocks_1_linear2.alpha"]) == 2
    assert float(written["lora_unet_single_blocks_11_linear2.alpha"]) == 16


@pytest.mark.parametrize(
    "stems",
    [
        [f"base_model.model.{STEM}_q", f"base_model.model.{STEM}_k", f"base_model.model.{STEM}_v"],
        [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    ],
)
def test_unequal_adapters_of_q_k_and_v_become_one_of_the_summed_rank(
    tmp_path: Path, load: Load, products: Products, stems: list[str]
) -> None:
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for rank, stem in zip((1, 2, 4), stems, strict=True):
        state |= _adapter(stem, rank)
    state |= {f"{stems[1]}.alpha": torch.tensor(3.0)}
    save_file(state, tmp_path / "src.safetensors")
    convert(tmp_path / "src.safetensors", tmp_path / "dst.safetensors", to="kohya")
    written, parts = load(tmp_path / "dst.safetensors")[0], products(state)
    assert written[f"{QKV}.lora_down.weight"].shape == (7, 8)
    up = written[f"{QKV}.lora_up.weight"]
    assert torch.count_nonzero(up) == 8 * 7, "a block for each part, zeros elsewhere"
    expected = torch.cat([parts[stem] for stem in stems])
    torch.testing.assert_close(products(written)[QKV], expected, rtol=1e-6, atol=1e-6)


def test_a_smaller_rank_is_the_best_there_is_and_its_error_is_told(
    golden: Path, tmp_path: Path, load: Load
) -> None:
    src, dst = golden / "lora_kohya.safetensors", tmp_path / "dst.safetensors"
    deltas, _ = load(golden / "lora_deltas.safetensors")
    done = convert(src, dst, to="kohya", max_rank=3)
    _, metadata = load(dst)
    squares = [0.0, 0.0]
    for name, update in read_adapters(dst):
        delta = deltas[f"{name}.weight"].double()
        singular = torch.linalg.svdvals(delta)
        error = float((update.delta_rows(slice(None)).double() - delta).norm())
        assert error == pytest.approx(float(singular[3:].norm()), abs=1e-5)
        assert update.rank <= 3
        name = f"lora_unet_{name.replace('.', '_')}"
        if name in done.errors:
            assert done.errors[name] == pytest.approx(error / float(delta.norm()), abs=1e-5)
            squares = [squares[0] + error**2, squares[1] + float(delta.square().sum())]
    assert len(done.errors) == len(
        [t for n, t in load(src)[0].items() if n.endswith("down.weight") and len(t) > 3]
    )
    assert done.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert metadata["ss_network_dim"] == "Dynamic"


# Parts of other models


def test_what_stands_on_no_module_is_left_out_only_if_told_and_by_name(
    golden: Path, tmp_path: Path, load: Load
) -> None:
    state, _ = load(golden / "lora_kohya.safetensors")
    strange = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        "lora_unet_final_layer_linear.lora_up.weight": torch.zeros(4, 4),
    }
    src, dst = tmp_path / "src.safetensors", tmp_path / "dst.safetensors"
    save_file(state | strange, src)
    with pytest.raises(HyimgError, match=r"2 of its 74 tensors .*`lora_te1_text") as error:
        convert(src, dst, to="comfy")
    assert "--allow_partial" in str(error.value.hint)
    assert not dst.exists()
    done = convert(src, dst, to="comfy", allow_partial=True)
    assert set(done.unmapped) == strange.keys()
    theirs, _ = load(golden / "lora_comfy.safetensors")
    assert read_header(dst).tensors.keys() == theirs.keys()


FOREIGN = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight": "Stable Diffusion XL or 1.5",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight": "Stable Diffusion XL or 1.5",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "a text encoder",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight": "Qwen-Image",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "Wan",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": "Stable Diffusion 3",
    "diffusion_model.layers.0.attention.qkv.lora_A.weight": "Lumina 2 or Z-Image",
    "double_stream_blocks.0.block.attn1.to_q.lora_A.weight": "HiDream",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_lora_for_another_model_is_told_from_its_names(tmp_path: Path, name: str) -> None:
    up = name.replace("lora_down", "lora_up").replace("lora.down", "lora.up").replace("lora_A", "lora_B")
    save_file({name: torch.zeros(2, 8), up: torch.zeros(8, 2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(HyimgError, match=f"not a LoRA of .* but of {FOREIGN[name]}, judging"):
        LoRAFile.open(tmp_path / "foreign.safetensors", allow_partial=True)


def test_flux_and_hunyuan_video_are_told_by_their_width(tmp_path: Path) -> None:
    # they have modules of the very same names, and others beside them
    state = _adapter("diffusion_model.double_blocks.0.img_attn.qkv", 2, 9216, 3072)
    state |= _adapter("diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn.qkv", 2)
    save_file(state, tmp_path / "flux.safetensors")
    with pytest.raises(HyimgError, match=r"3072 wide, like those of FLUX\.1 and HunyuanVideo"):
        LoRAFile.open(tmp_path / "flux.safetensors")


# Kinds of adapters that are not read

NAME = "lora_unet_double_blocks_0_img_attn_proj"
PEFT_NAME = f"base_model.model.{STEM}_proj"
VECTOR, MATRIX = torch.ones(8), torch.ones(8, 8)
OTHER_KINDS: dict[str, tuple[dict[str, Tensor], str]] = {
    "full": ({f"{NAME}.diff": MATRIX, f"{NAME}.diff_b": VECTOR}, "full weights (LyCORIS's `full`)"),
    "norm": ({f"{NAME}.w_norm": VECTOR, f"{NAME}.b_norm": VECTOR}, "norm layers (LyCORIS's `train_norm`)"),
    "oft": ({f"{NAME}.oft_blocks": torch.ones(2, 4, 4), f"{NAME}.alpha": torch.tensor(0.1)}, "OFT"),
    "boft": (
        {
            f"{NAME}.oft_blocks": torch.ones(1, 2, 4, 4),
            f"{NAME}.alpha": torch.tensor(0.1),
            f"{NAME}.rescale": MATRIX[:, :1],
        },
        "BOFT",
    ),
    "glora": (
        {f"{NAME}.{end}.weight": MATRIX for end in ("a1", "a2", "b1", "b2")}
        | {f"{NAME}.alpha": torch.tensor(1.0)},
        "GLoRA",
    ),
    "ia3": ({f"{NAME}.weight": VECTOR, f"{NAME}.on_input": torch.tensor(0)}, "IA3"),
    "oft of PEFT": ({f"{PEFT_NAME}.oft_R.weight": torch.ones(2, 6)}, "OFT"),
    "boft of PEFT": (
        {f"{PEFT_NAME}.boft_R": torch.ones(1, 2, 4, 4), f"{PEFT_NAME}.boft_s": MATRIX[:, :1]},
        "BOFT",
    ),
    "ia3 of PEFT": ({f"{PEFT_NAME}.ia3_l": MATRIX[:, :1]}, "IA3"),
    "vera": ({f"{PEFT_NAME}.vera_lambda_b": VECTOR, f"{PEFT_NAME}.vera_lambda_d": VECTOR[:4]}, "VeRA"),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_another_kind_of_adapter_is_called_by_its_name(
    tmp_path: Path, golden: Path, load: Load, case: str
) -> None:
    state, kind = OTHER_KINDS[case]
    path, mixed = tmp_path / "other.safetensors", tmp_path / "mixed.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    with pytest.raises(HyimgError) as error:
        LoRAFile.open(path, allow_partial=True)
    assert (
        f"is not a LoRA but {kind}, which is not supported: {len(state)} of {kind}: `" in error.value.message
    )
    with pytest.raises(HyimgError, match="is a LoRA, not a diffusion transformer"):
        open_dit(path)
    # next to modules that are read: all its tensors are counted and named, alpha too
    read, _ = load(golden / "lora_kohya.safetensors")
    rest = {name: tensor for name, tensor in read.items() if not name.startswith(NAME)}
    save_file(rest | {name: tensor.clone() for name, tensor in state.items()}, mixed)
    with pytest.raises(HyimgError) as error:
        LoRAFile.open(mixed)
    assert f"{len(state)} of its {len(rest) + len(state)} tensors are not read, " in error.value.message
    assert f"{len(state)} of {kind}: `" in error.value.message
    assert set(LoRAFile.open(mixed, allow_partial=True).unmapped) == state.keys()


def test_biases_and_the_models_own_weights_of_peft_are_called_so(tmp_path: Path) -> None:
    state = _adapter(PEFT_NAME, 2) | {f"{PEFT_NAME}.lora_B.bias": torch.ones(8)}
    state |= {"base_model.model.final_layer.linear.weight": torch.ones(4, 4)}
    save_file(state, tmp_path / "peft.safetensors")
    with pytest.raises(HyimgError) as error:
        LoRAFile.open(tmp_path / "peft.safetensors")
    assert "1 of biases (PEFT's `lora_bias`): `" in error.value.message
    assert (
        "1 of the model's own weights (PEFT's `modules_to_save` or `bias`): `base_model"
        in error.value.message
    )


@pytest.mark.parametrize(("alpha", "warns"), [(4.0, True), (8.0, False)])
def test_an_alpha_that_lacks_lycoris_rs_lora_is_a_warning(tmp_path: Path, alpha: float, warns: bool) -> None:
    """Releases differ in whether alpha has the scale alpha / sqrt(rank) in it: 4 * 4 / sqrt(4) = 8."""
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    state = {f"{stem}.lora_down.weight": torch.ones(4, 8), f"{stem}.lora_up.weight": torch.ones(8, 4)}
    state[f"{stem}.alpha"] = torch.tensor(alpha)
    metadata = {"ss_network_alpha": "4.0", "ss_network_args": json.dumps({"rs_lora": "True", "algo": "lora"})}
    save_file(state, tmp_path / "lycoris.safetensors", metadata)
    warnings = LoRAFile.open(tmp_path / "lycoris.safetensors").warnings()
    assert ["rs_lora" in warning for warning in warnings] == [True] * warns


# DoRA


def test_a_dora_of_split_parts_is_put_together_by_rows(golden: Path, tmp_path: Path, load: Load) -> None:
    state, _ = load(golden / "lora_kohya.safetensors")
    modules = [name.removesuffix(".alpha") for name in state if name.endswith(".alpha")]
    state |= {f"{name}.dora_scale": torch.rand(len(state[f"{name}.lora_up.weight"]), 1) for name in modules}
    src, there, back = (tmp_path / f"{name}.safetensors" for name in ("src", "there", "back"))
    save_file(state, src)
    convert(src, there, to="diffusers")
    vector = load(there)[0]["transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector"]
    assert torch.equal(vector, state[f"{QKV}.dora_scale"][96:192, 0])
    convert(there, back, to="kohya")
    written = load(back)[0]
    assert all(torch.equal(written[f"{name}.dora_scale"], state[f"{name}.dora_scale"]) for name in modules)


def test_a_dora_is_refused_where_its_update_cannot_be_held(golden: Path, tmp_path: Path, load: Load) -> None:
    state, _ = load(golden / "lora_kohya.safetensors")
    src, dst = tmp_path / "src.safetensors", tmp_path / "dst.safetensors"
    save_file(state | {f"{QKV}.dora_scale": torch.rand(288, 1)}, src)
    with pytest.raises(HyimgError, match="only some modules of"):
        convert(src, dst, to="diffusers")
    with pytest.raises(HyimgError, match="which diffusion-pipe's format cannot hold"):
        convert(src, dst, to="peft")
    with pytest.raises(HyimgError, match="cannot be scaled, or combined"):
        merge([(src, 0.5), (golden / "lora_kohya.safetensors", 0.5)], dst)
    with pytest.raises(HyimgError, match="no closest one of a lower rank"):
        convert(src, dst, to="kohya", max_rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["src.safetensors"]


# Merging


@pytest.mark.parametrize("to", FILE_OF)
def test_a_merged_file_is_the_weighted_sum_of_files_in_any_forms(
    golden: Path, tmp_path: Path, load: Load, to: str
) -> None:
    deltas, _ = load(golden / "lora_deltas.safetensors")
    other = {"transformer.transformer_blocks.0.attn.to_q": 3, "transformer.transformer_blocks.0.attn.to_v": 2}
    torch.manual_seed(1)
    state: dict[str, Tensor] = {}
    for stem, rank in other.items():
        state |= _adapter(stem, rank, 96, 96)
    save_file(state, tmp_path / "qv.safetensors")
    files = [
        (golden / "lora_kohya.safetensors", 0.7),
        (golden / "lora_dpipe.safetensors", -0.25),
        (tmp_path / "qv.safetensors", 2.0),
    ]
    done = merge(files, tmp_path / "merged.safetensors", to=to)
    assert (done.source_format, done.target_format, done.num_modules) == (None, to, 24)
    header = read_header(tmp_path / "merged.safetensors")
    assert LoRAFile.open(header.path).formats == (to,)
    assert json.loads(header.metadata["hyimg_merged_from"])[1] == {
        "file": "lora_dpipe.safetensors",
        "weight": -0.25,
    }
    expected = {name: 0.45 * delta for name, delta in deltas.items()}
    q, v = (state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"] for stem in other)
    expected["double_blocks.0.img_attn_qkv.weight"] += 2 * torch.cat([q, torch.zeros(96, 96), v])
    for name, update in read_adapters(tmp_path / "merged.safetensors"):
        want = expected[f"{name}.weight"]
        torch.testing.assert_close(update.delta_rows(slice(None)), want, rtol=1e-6, atol=1e-5)


def test_an_adapter_that_one_file_alone_has_gets_its_weight(golden: Path, tmp_path: Path, load: Load) -> None:
    state, _ = load(golden / "lora_kohya.safetensors")
    halves = [{}, {}]  # type: list[dict[str, Tensor]]
    for name, tensor in state.items():
        halves["single" in name][name] = tensor
    files = [(tmp_path / "double.safetensors", 0.5), (tmp_path / "single.safetensors", -2.0)]
    for (path, _), half in zip(files, halves, strict=True):
        save_file(half, path)
    merge(files, tmp_path / "merged.safetensors")
    deltas, _ = load(golden / "lora_deltas.safetensors")
    for name, update in read_adapters(tmp_path / "merged.safetensors"):
        want = deltas[f"{name}.weight"] * (-2.0 if "single" in name else 0.5)
        torch.testing.assert_close(update.delta_rows(slice(None)), want, rtol=1e-6, atol=1e-6)


def test_what_all_files_say_of_themselves_is_kept(golden: Path, tmp_path: Path, load: Load) -> None:
    state, metadata = load(golden / "lora_kohya.safetensors")
    save_file(state, tmp_path / "other.safetensors", metadata | {"ss_steps": "7"})
    files = [(golden / "lora_kohya.safetensors", 1.0), (tmp_path / "other.safetensors", 1.0)]
    merge(files, tmp_path / "merged.safetensors")
    merged = read_header(tmp_path / "merged.safetensors").metadata
    assert merged["ss_seed"] == metadata["ss_seed"]
    assert "ss_steps" not in merged
    assert merged["ss_network_dim"] == "Dynamic", "ranks have added up"
    assert merged["sshs_model_hash"] != metadata["sshs_model_hash"]


def test_loras_of_two_models_are_not_merged(golden: Path, tmp_path: Path) -> None:
    save_file(
        _adapter("diffusion_model.double_blocks.0.img_attn.qkv", 2, 24, 8), tmp_path / "small.safetensors"
    )
    with pytest.raises(HyimgError, match="model of width 8, but .* for one of width 96"):
        merge(
            [(golden / "lora_kohya.safetensors", 1.0), (tmp_path / "small.safetensors", 1.0)],
            tmp_path / "dst.safetensors",
        )
