"""The rows of `inspect-modules` against the golden lists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyimg.checkpoints.architecture import DIT_2_1, DiTArch
from hyimg.checkpoints.names import linear_modules
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.errors import HyimgError
from hyimg.lora.files.conversion import save_lora
from hyimg.lora.inspection import block_ranges, ends, inspect, leaves
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import parse_network_args, plan_network
from hyimg.model.dit import DiT


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_rows_are_the_golden_list_in_its_order(golden: Path, lora_arch: DiTArch, size: str) -> None:
    arch, file = (DIT_2_1, "lora_modules.json") if size == "full" else (lora_arch, "lora_modules_tiny.json")
    expected = json.loads((golden / file).read_text())
    rows = inspect(arch).rows
    assert len(rows) == expected["count"]
    assert [
        {
            "lora_name": r.lora_name,
            "module": r.name,
            "in_features": r.in_features,
            "out_features": r.out_features,
        }
        for r in rows
    ] == expected["modules"]


def test_parameters_and_totals_are_those_of_the_full_size_model(golden: Path) -> None:
    shapes = json.loads((golden / "dit_keys.json").read_text())
    shapes = shapes.get("tensors", shapes.get("keys", shapes))
    inspection = inspect(DIT_2_1, dim=16)
    totals = inspection.totals
    assert (totals.modules, totals.adapted_modules) == (320, 320)
    assert totals.trainable_parameters == 16 * sum(r.in_features + r.out_features for r in inspection.rows)
    assert totals.file_bytes == 2 * totals.trainable_parameters + 2 * 320
    assert totals.optimizer_bytes == 8 * totals.trainable_parameters
    for row in inspection.rows[::37]:
        weight, bias = shapes[f"{row.name}.weight"], shapes[f"{row.name}.bias"]
        assert row.parameters == weight[0] * weight[1] + bias[0]


def test_ranks_and_rates_are_shown_as_training_would_use_them() -> None:
    inspection = inspect(
        DIT_2_1,
        dim=8,
        alpha=4.0,
        learning_rate=1e-4,
        network_args=["network_reg_dims=single=0,_0_linear1=2", "network_reg_lrs=img_mod=0,txt_atn=1"],
    )
    rows = {row.name: row for row in inspection.rows}
    assert (rows["single_blocks.0.linear1"].rank, rows["single_blocks.1.linear1"].rank) == (2, 0)
    assert rows["single_blocks.0.linear1"].alpha == 4.0
    assert rows["double_blocks.0.img_mod.linear"].learning_rate == 0
    assert rows["double_blocks.0.img_attn_qkv"].learning_rate == 1e-4
    assert [(p.pattern, p.value, p.num_modules) for p in inspection.patterns] == [
        ("single", 0, 120),
        ("_0_linear1", 2, 1),
        ("img_mod", 0, 20),
        ("txt_atn", 1, 0),
    ]
    (warning,) = inspection.warnings
    assert "`txt_atn` in `network_reg_lrs` matches no module" in warning
    assert inspection.totals.adapted_modules == 201
    # A frozen module stands in the file and not in the optimiser
    in_file = inspection.totals.file_bytes // 2 - inspection.totals.adapted_modules
    assert inspection.totals.trainable_parameters < in_file
    assert inspection.totals.optimizer_bytes == 8 * inspection.totals.trainable_parameters


def test_a_filter_shows_fewer_rows_and_the_same_totals() -> None:
    whole, filtered = inspect(DIT_2_1), inspect(DIT_2_1, pattern=r"double_blocks\.[01]\.img")
    assert len(filtered.rows) == 10
    assert filtered.totals == whole.totals
    with pytest.raises(HyimgError, match="not a valid regular expression"):
        inspect(DIT_2_1, pattern="(")


def test_inspection_imports_no_torch() -> None:
    code = (
        "import sys; from hyimg.lora.inspection import inspect;"
        "from hyimg.checkpoints.architecture import DIT_2_1; inspect(DIT_2_1);"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_weak_update_is_warned_of() -> None:
    (warning,) = inspect(DIT_2_1, dim=32, alpha=2.0).warnings
    assert "makes the update 16 times weaker" in warning
    assert not inspect(DIT_2_1, dim=32, alpha=4.0).warnings


@pytest.mark.parametrize("args", [(), ("split_qkv=True",), ("dora=True", "network_reg_dims=mlp=0,img_=8")])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float", torch.float32)])
def test_the_file_has_the_size_that_was_told(
    lora_dit: DiT, tmp_path: Path, args: tuple[str, ...], precision: str, dtype: torch.dtype
) -> None:
    totals = inspect(lora_dit.arch, dim=6, network_args=args, save_precision=precision).totals
    plan = plan_network(linear_modules(lora_dit.arch), dim=6, args=parse_network_args(args))
    network = AdapterNetwork.create(lora_dit, plan=plan)
    assert sum(p.numel() for p in network.parameters()) == totals.trainable_parameters
    save_lora(tmp_path / "lora.safetensors", network.state(), dtype=dtype)
    header = read_header(tmp_path / "lora.safetensors")
    assert sum(info.end - info.start for info in header.tensors.values()) == totals.file_bytes


@pytest.mark.parametrize(
    ("names", "file"),
    [
        ("kohya", "lora_kohya"),
        ("comfy", "lora_comfy"),
        ("diffusers", "lora_diffusers"),
        ("peft", "lora_dpipe"),
    ],
)
def test_names_are_those_of_each_tool_s_files(
    golden: Path, lora_arch: DiTArch, names: str, file: str
) -> None:
    keys = read_header(golden / f"{file}.safetensors").tensors
    in_file = {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key}
    shown = [name for row in inspect(lora_arch, names=names).rows for name in row.names]
    assert len(set(shown)) == len(shown)
    assert in_file <= set(shown)


def test_blocks_that_are_alike_are_told_once_and_a_range_ends_where_they_differ() -> None:
    rows = inspect(
        DIT_2_1,
        network_args=[
            r"network_reg_dims=double_blocks\.7\.img_attn=8,single_blocks\.39\.=0",
            r"network_reg_lrs=single_blocks\.[01]\..*linear2=1e-5",
        ],
    ).rows
    ranges = block_ranges(rows)
    assert [(b.title, b.count) for b in ranges] == [
        ("double_blocks.0..6", 7),
        ("double_blocks.7", 1),
        ("double_blocks.8..19", 12),
        ("single_blocks.0..1", 2),
        ("single_blocks.2..38", 37),
        ("single_blocks.39", 1),
    ]
    told = sum(b.count * len(b.rows) for b in ranges)
    assert told == len(rows) == 320
    assert {row.rank for row in ranges[1].rows if "img_attn" in row.name} == {8}
    assert [line[::2] for line in leaves(ranges[-1])] == [
        ("├── ", "linear1"),
        ("├── ", "linear2"),
        ("└── ", "modulation.linear"),
    ]


def test_blocks_with_a_gap_between_them_are_two_ranges() -> None:
    """A filter that leaves blocks out must not be read as a range over them."""
    rows = inspect(DIT_2_1, pattern=r"double_blocks\.(0|1|3)\.img_attn|single_blocks\.[4-6]\.linear1").rows
    assert [b.title for b in block_ranges(rows)] == [
        "double_blocks.0..1",
        "double_blocks.3",
        "single_blocks.4..6",
    ]


def test_titles_and_ends_follow_the_spelling() -> None:
    def first(names: str) -> tuple[str, list[tuple[str, ...]]]:
        block = block_ranges(inspect(DIT_2_1, names=names, pattern="double.*img_attn").rows)[0]
        return block.title, [ends(row) for row in block.rows]

    assert first("kohya") == (
        "lora_unet_double_blocks_0..19",
        [("img_attn_qkv",), ("img_attn_proj",)],
    )
    assert first("peft") == (
        "diffusion_model.double_blocks.0..19",
        [("img_attn.qkv",), ("img_attn.proj",)],
    )
    assert first("diffusers") == (
        "transformer.transformer_blocks.0..19",
        [("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.to_out.0",)],
    )
