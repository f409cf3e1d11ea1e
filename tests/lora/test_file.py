"""Saving and converting LoRA files, against the golden files of the other tools."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.lora.files.compatibility import report_module
from hyimg.lora.files.conversion import convert, read_adapters, read_lora, save_lora
from hyimg.lora.files.foreign import METADATA_KEY

Load = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
Products = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

FILE_OF = {"kohya": "lora_kohya", "comfy": "lora_comfy", "peft": "lora_dpipe", "diffusers": "lora_diffusers"}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PAIRS = [(source, target) for source in FILE_OF for target in FILE_OF if source != target]


def _golden(golden: Path, form: str) -> Path:
    return golden / f"{FILE_OF[form]}.safetensors"


# Conversion


@pytest.mark.parametrize(("source", "target"), [("kohya", "comfy"), ("comfy", "kohya")])
def test_renaming_equals_the_reference_converter_bit_for_bit(
    golden: Path, tmp_path: Path, load: Load, source: str, target: str
) -> None:
    dst = tmp_path / "dst.safetensors"
    done = convert(_golden(golden, source), dst, to=target)
    assert (done.source_format, done.target_format, done.num_modules) == (source, target, 24)
    ours, metadata = load(dst)
    theirs, their_metadata = load(
        golden / ("lora_comfy.safetensors" if target == "comfy" else "lora_comfy_reversed.safetensors")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metadata == their_metadata


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pair_of_forms_keeps_every_delta(
    golden: Path, tmp_path: Path, load: Load, products: Products, source: str, target: str
) -> None:
    dst = tmp_path / "dst.safetensors"
    convert(_golden(golden, source), dst, to=target)
    (ours, metadata), theirs = load(dst), load(_golden(golden, target))[0]
    assert target in ("kohya", "comfy") or metadata["format"] == "pt"
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    # Each file is compared with the one that its own tool wrote of the same adapter: float32 rounding
    for module, delta in products(theirs).items():
        torch.testing.assert_close(products(ours)[module], delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("middle", ["comfy", "peft", "diffusers"])
def test_there_and_back_again(
    golden: Path, tmp_path: Path, load: Load, products: Products, middle: str
) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert(_golden(golden, "kohya"), there, to=middle)
    convert(there, back, to="kohya")
    ours, theirs = load(back)[0], load(_golden(golden, "kohya"))[0]
    if middle == "comfy":
        assert back.read_bytes()[-1000:] == _golden(golden, "kohya").read_bytes()[-1000:]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for module, delta in products(theirs).items():
        torch.testing.assert_close(products(ours)[module], delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_adapters_of_q_and_v_alone_become_one_of_the_summed_rank(
    tmp_path: Path, load: Load, products: Products, shared: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    block = "transformer.transformer_blocks.0.attn"
    state = {}
    for name, rank in (("to_q", 2), ("to_v", 2 if shared else 5)):
        state[f"{block}.{name}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        state[f"{block}.{name}.lora_B.weight"] = torch.randn(8, rank, generator=generator)
    if shared:
        state[f"{block}.to_v.lora_A.weight"] = state[f"{block}.to_q.lora_A.weight"].clone()
    else:
        state[f"{block}.to_v.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "src.safetensors")
    convert(tmp_path / "src.safetensors", tmp_path / "dst.safetensors", to="kohya")
    written, metadata = load(tmp_path / "dst.safetensors")
    assert len(written[f"{QKV}.lora_down.weight"]) == (4 if shared else 7)
    assert metadata == {}  # none in, none out
    parts = products(state)
    expected = torch.cat([parts[f"{block}.to_q"], torch.zeros(8, 8), parts[f"{block}.to_v"]])
    torch.testing.assert_close(products(written)[QKV], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_half_precision_keeps_its_delta_when_the_scale_is_folded_in(
    tmp_path: Path, load: Load, products: Products, dtype: torch.dtype, alpha: float
) -> None:
    name = "lora_unet_single_blocks_3_linear2"
    state = {
        f"{name}.lora_down.weight": torch.randn(4, 40).to(dtype),
        f"{name}.lora_up.weight": torch.randn(8, 4).to(dtype) * 1e-4,
        f"{name}.alpha": torch.tensor(alpha).to(dtype),
    }
    save_file(state, tmp_path / "src.safetensors")
    convert(tmp_path / "src.safetensors", tmp_path / "dst.safetensors", to="peft")
    written = load(tmp_path / "dst.safetensors")[0]
    (ours,), (theirs,) = products(written).values(), products(state).values()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)  # float32 rounding of sums near 1e-4
    up = written["diffusion_model.single_blocks.3.linear2.lora_B.weight"]
    # bfloat16 times 1/4 is exact; nothing else is, in half precision
    assert up.dtype == (dtype if dtype == torch.bfloat16 and alpha == 1 else torch.float32)


def test_alpha_in_pefts_configuration_is_honoured(tmp_path: Path, load: Load, products: Products) -> None:
    module = "transformer.single_transformer_blocks.0.proj_out"
    state = {f"{module}.lora_A.weight": torch.randn(4, 40), f"{module}.lora_B.weight": torch.randn(8, 4)}
    config = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.alpha_pattern": {}}
    save_file(state, tmp_path / "src.safetensors", {METADATA_KEY: json.dumps(config)})
    convert(tmp_path / "src.safetensors", tmp_path / "dst.safetensors", to="kohya")
    written, metadata = load(tmp_path / "dst.safetensors")
    assert METADATA_KEY not in metadata
    (ours,), (unscaled,) = products(written).values(), products(state).values()
    torch.testing.assert_close(ours, 4 * unscaled)


def test_dora_is_carried_by_a_change_of_names_and_refused_elsewhere(
    golden: Path, tmp_path: Path, load: Load
) -> None:
    state, metadata = load(_golden(golden, "kohya"))
    name = "lora_unet_double_blocks_0_img_mlp_fc1"
    state[f"{name}.dora_scale"] = torch.rand(384, 1)
    src = tmp_path / "src.safetensors"
    save_file(state, src, metadata)
    convert(src, tmp_path / "comfy.safetensors", to="comfy")
    carried = load(tmp_path / "comfy.safetensors")[0]["lora_unet_double_blocks_0_img_mlp_0.dora_scale"]
    assert torch.equal(carried, state[f"{name}.dora_scale"])
    with pytest.raises(HyimgError, match=r"dora_scale.*cannot hold"):
        convert(src, tmp_path / "no.safetensors", to="peft")
    assert not (tmp_path / "no.safetensors").exists()
    assert torch.equal(read_lora(tmp_path / "comfy.safetensors")[f"{name}.dora_scale"], carried)


def test_magnitudes_are_read_by_rows_only(golden: Path, tmp_path: Path, load: Load) -> None:
    state, _ = load(_golden(golden, "kohya"))
    name = "lora_unet_double_blocks_0_img_mlp_fc1.dora_scale"
    src = tmp_path / "src.safetensors"
    save_file({**state, name: torch.rand(384)}, src)
    assert read_lora(src)[name].shape == (384, 1)
    save_file({**state, name: torch.rand(1, 96)}, src)
    with pytest.raises(HyimgError, match=r"\[1, 96\], but \[384, 1\] is a norm for each output row"):
        read_lora(src)


def test_magnitudes_keep_their_precision_in_a_half_precision_file(tmp_path: Path, load: Load) -> None:
    state = {"lora_unet_x.lora_up.weight": torch.rand(3, 2), "lora_unet_x.dora_scale": torch.rand(3, 1)}
    save_lora(tmp_path / "lora.safetensors", state, dtype=torch.bfloat16)
    saved = load(tmp_path / "lora.safetensors")[0]
    assert saved["lora_unet_x.lora_up.weight"].dtype == torch.bfloat16
    assert torch.equal(saved["lora_unet_x.dora_scale"], state["lora_unet_x.dora_scale"])


def test_an_attention_only_file_may_be_written_in_either_of_its_two_forms(
    golden: Path, tmp_path: Path, load: Load
) -> None:
    state = {name: t for name, t in load(_golden(golden, "kohya"))[0].items() if "img_attn" in name}
    save_file(state, tmp_path / "src.safetensors")
    for form in ("comfy", "kohya"):
        convert(tmp_path / "src.safetensors", tmp_path / f"{form}.safetensors", to=form)
        assert load(tmp_path / f"{form}.safetensors")[0].keys() == state.keys()


def test_conversion_neither_imports_torch_nor_loads_the_file(tmp_path: Path) -> None:
    src, dst = tmp_path / "src.safetensors", tmp_path / "dst.safetensors"
    _write_zeros(src, rank=160)
    assert src.stat().st_size > 30e6
    for form in ("comfy", "diffusers"):
        code = (
            "import sys; from hyimg.lora.files.conversion import convert;"
            f"convert({str(src)!r}, {str(dst)!r}, to={form!r});"
            "print('torch' in sys.modules)"
        )
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "False"
    tracemalloc.start()
    convert(src, dst, to="comfy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def _write_zeros(path: Path, rank: int) -> None:
    """A LoRA as large as wished, written without building it in memory."""
    header, position = {}, 0
    for index in range(8):
        for end, shape in (("lora_down", (rank, 3584)), ("lora_up", (3 * 3584, rank))):
            size = shape[0] * shape[1] * 2
            name = f"lora_unet_double_blocks_{index}_img_attn_qkv.{end}.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (position, position + size)}
            position += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


# Values that are no numbers


LARGEST = {
    torch.bfloat16: 0x7F7F,
    torch.float16: 0x7BFF,
    torch.float32: 0x7F7F_FFFF,
    torch.float64: 0x7FEF_FFFF_FFFF_FFFF,
    torch.float8_e5m2: 0x7B,
    torch.float8_e4m3fn: 0x7E,
}
"""The largest number of each type, bit by bit: one more is infinity, or NaN."""


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_and_infinity_are_refused_in_every_precision_and_the_largest_number_is_not(
    tmp_path: Path, dtype: torch.dtype, sign: int
) -> None:
    name = "lora_unet_double_blocks_0_img_mlp_fc1"
    width = dtype.itemsize
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    src, dst = tmp_path / "src.safetensors", tmp_path / "dst.safetensors"
    for bits, is_finite in ((LARGEST[dtype], True), (LARGEST[dtype] + 1, False)):
        if sign < 0:
            bits |= 1 << (8 * width - 1)
        if width > 1 and sign < 0:
            bits -= 1 << (8 * width)
        # several chunks, the value at the very end
        up = torch.zeros(80_000 // width * 4, 4, dtype=integers)
        up[-1, -1] = bits
        state = {
            f"{name}.lora_down.weight": torch.ones(4, len(up) // 4).to(dtype),
            f"{name}.lora_up.weight": up.view(dtype),
        }
        save_file(state, src)
        if is_finite:
            convert(src, dst, to="comfy")
            dst.unlink()
            continue
        for target, max_rank in (("comfy", None), ("diffusers", None), ("comfy", 2)):
            with pytest.raises(HyimgError, match="holds NaN or infinity, in `.*lora_up.weight`"):
                convert(src, dst, to=target, max_rank=max_rank)
            assert not dst.exists()
        ((_, adapter),) = read_adapters(src, report_only=True)
        assert report_module("m", adapter).norm is None
        with pytest.raises(HyimgError, match="holds NaN or infinity"):
            read_lora(src)


def test_a_scale_is_not_folded_into_what_is_not_finite(golden: Path, tmp_path: Path, load: Load) -> None:
    state, _ = load(_golden(golden, "kohya"))
    state[f"{QKV}.alpha"] = torch.tensor(1.0)
    state[f"{QKV}.lora_up.weight"][5, 0] = torch.inf
    save_file(state, tmp_path / "src.safetensors")
    for target in ("peft", "diffusers"):
        with pytest.raises(HyimgError, match=f"holds NaN or infinity, in `{QKV}.lora_up.weight`"):
            convert(tmp_path / "src.safetensors", tmp_path / "dst.safetensors", to=target)
    assert not (tmp_path / "dst.safetensors").exists()


# Hashes


def test_hashes_are_those_of_the_golden_recipes(golden: Path, tmp_path: Path, load: Load) -> None:
    def tensor(recipe: str) -> Tensor:
        count, dtype = recipe.removeprefix("arange(").split(") ")
        return torch.from_numpy(np.arange(int(count), dtype=np.float32)).to(getattr(torch, dtype))

    for case in json.loads((golden / "lora_network.json").read_text())["hash_recipes"]:
        path = tmp_path / "hashed.safetensors"
        save_lora(path, {name: tensor(recipe) for name, recipe in case["recipe"].items()}, case["metadata"])
        metadata = load(path)[1]
        expected = {key: case[key] for key in ("sshs_model_hash", "sshs_legacy_hash")}
        assert metadata == {**case["metadata"], **expected}


def test_the_layout_is_that_of_the_safetensors_library(tmp_path: Path) -> None:
    state = {
        "b": torch.arange(3, dtype=torch.bfloat16),
        "a": torch.arange(5, dtype=torch.float16),
        "ü": torch.tensor(2.0),
        "d": torch.arange(6.0).reshape(3, 2).T,  # not contiguous
        "c": torch.arange(3, dtype=torch.int64),
    }
    path = tmp_path / "ours.safetensors"
    save_lora(path, state, {"ss_x": 'é"\n\\'})
    library = save({name: t.contiguous() for name, t in state.items()}, {"ss_x": 'é"\n\\'})
    ours = path.read_bytes()
    size = int.from_bytes(library[:8], "little")
    our_size = int.from_bytes(ours[:8], "little")
    assert ours[8 + our_size :] == library[8 + size :]
    theirs, header = json.loads(library[8 : 8 + size]), json.loads(ours[8 : 8 + our_size])
    assert header.pop("__metadata__").keys() == {"ss_x", "sshs_model_hash", "sshs_legacy_hash"}
    theirs.pop("__metadata__")
    assert list(header) == list(theirs)
    assert header == theirs


def test_saving_converts_every_tensor_to_the_precision_asked_for(tmp_path: Path, load: Load) -> None:
    name = "lora_unet_single_blocks_0_linear2"
    state = {
        f"{name}.lora_down.weight": torch.randn(2, 40),
        f"{name}.lora_up.weight": torch.randn(8, 2, requires_grad=True),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_lora(tmp_path / "bf16.safetensors", state, dtype=torch.bfloat16)
    written, metadata = load(tmp_path / "bf16.safetensors")
    assert {key: t.dtype for key, t in written.items()} == dict.fromkeys(state, torch.bfloat16)
    assert all(torch.equal(t, state[key].detach().bfloat16()) for key, t in written.items())
    assert metadata.keys() == {"sshs_model_hash", "sshs_legacy_hash"}


# Reading


@pytest.mark.parametrize("form", FILE_OF)
def test_a_file_in_any_form_is_read_under_the_reference_names(
    golden: Path, load: Load, products: Products, form: str
) -> None:
    ours, theirs = read_lora(_golden(golden, form)), load(_golden(golden, "kohya"))[0]
    assert ours.keys() == theirs.keys()
    for module, delta in products(theirs).items():
        torch.testing.assert_close(products(ours)[module], delta, rtol=0, atol=1e-6)


# Wrong input


PEFT_DOWN = "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"
SPLIT = "transformer.transformer_blocks.0.attn.to_q"
# What is put into the golden file (None: taken out), and what the sentence says
WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "integers": (
        {f"{QKV}.lora_up.weight": torch.zeros(288, 8, dtype=torch.int8)},
        "`.*lora_up.weight` in .* has the dtype I8",
    ),
    "empty": (
        {f"{QKV}.lora_down.weight": torch.zeros(8, 0), f"{QKV}.lora_up.weight": torch.zeros(0, 8)},
        "do not form a matrix product",
    ),
    "unknown": ({"lora_te_x.alpha": torch.tensor(1.0)}, "1 of its 73 tensors.*`lora_te_x.alpha`"),
    "no up": (
        {f"{QKV}.lora_up.weight": None},
        "incomplete: .*but not the up of `double_blocks.0.img_attn_qkv`",
    ),
    "wrong columns": ({f"{QKV}.lora_down.weight": torch.zeros(8, 97)}, "is 97 wide where the width 96"),
    "wrong rows": ({f"{QKV}.lora_up.weight": torch.zeros(192, 8)}, "is 192 wide where"),
    "ranks differ": ({f"{QKV}.lora_up.weight": torch.zeros(288, 4)}, "do not form a matrix product"),
    "said twice": ({PEFT_DOWN: torch.zeros(8, 96)}, "holds one tensor twice"),
    "whole and split": (
        {f"{SPLIT}.lora_A.weight": torch.zeros(8, 96), f"{SPLIT}.lora_B.weight": torch.zeros(96, 8)},
        "two adapters of `double_blocks.0.img_attn_qkv`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_no_lora_of_this_model_is_refused_and_nothing_written(
    golden: Path, tmp_path: Path, load: Load, case: str
) -> None:
    changes, named = WRONG[case]
    src = tmp_path / "src.safetensors"
    state = {**load(_golden(golden, "kohya"))[0], **changes}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, src)
    with pytest.raises(HyimgError, match=named):
        convert(src, tmp_path / "dst.safetensors", to="comfy")
    assert [path.name for path in tmp_path.iterdir()] == ["src.safetensors"]


def test_a_lora_of_a_model_with_the_same_names_is_told_by_its_width(tmp_path: Path) -> None:
    state = {f"{QKV}.lora_down.weight": torch.zeros(2, 3072), f"{QKV}.lora_up.weight": torch.zeros(9216, 2)}
    save_file(state, tmp_path / "flux.safetensors")
    with pytest.raises(HyimgError, match=r"3072 wide, like those of FLUX\.1"):
        convert(tmp_path / "flux.safetensors", tmp_path / "dst.safetensors", to="comfy")


def test_files_of_another_kind_are_refused(golden: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(_golden(golden, "kohya").read_bytes()[:-100])
    for src, named in (
        (golden / "lora_deltas.safetensors", "not a LoRA but a diffusion transformer"),
        (golden / "vae_tiny.safetensors", "not a LoRA but a VAE"),
        (truncated, "truncated"),
        (tmp_path / "none.safetensors", "there is no file"),
    ):
        with pytest.raises(HyimgError, match=named):
            convert(src, tmp_path / "dst.safetensors")
    assert not (tmp_path / "dst.safetensors").exists()


@pytest.mark.parametrize("form", FILE_OF)
def test_a_file_that_is_in_the_form_already_is_refused(golden: Path, tmp_path: Path, form: str) -> None:
    with pytest.raises(HyimgError, match="already in "):
        convert(_golden(golden, form), tmp_path / "dst.safetensors", to=form)
    assert not list(tmp_path.iterdir())


def test_a_destination_that_cannot_be_written_is_refused_and_the_source_is_left_alone(
    golden: Path, tmp_path: Path
) -> None:
    src = tmp_path / "src.safetensors"
    shutil.copy(_golden(golden, "kohya"), src)
    (tmp_path / "link.safetensors").symlink_to(src)
    (tmp_path / "file").touch()
    for dst, named in (
        (src, "is the source file itself"),
        (tmp_path / "link.safetensors", "is the source file itself"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "dst.safetensors", "cannot write"),
    ):
        with pytest.raises(HyimgError, match=named):
            convert(src, dst)
    with pytest.raises(HyimgError, match="`comfyui` is not a LoRA format"):
        convert(src, tmp_path / "dst.safetensors", to="comfyui")
    assert src.read_bytes() == _golden(golden, "kohya").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link.safetensors", "src.safetensors"]


def test_a_failure_while_writing_leaves_the_old_destination(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst.safetensors"
    dst.write_text("old")

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hyimg.checkpoints.safetensors_writer._legacy_hash", fails)
    with pytest.raises(HyimgError, match="disk is full"):
        convert(_golden(golden, "kohya"), dst)
    assert dst.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["dst.safetensors"]
