"""The rows of `inspect-modules` against the golden lists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hyimg.errors import HyimgError
from hyimg.lora.inspection import inspect
from hyimg.model.architecture import DIT_2_1, DiTArch


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
    assert totals.file_bytes == 4 * totals.trainable_parameters + 4 * 320
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
    assert inspection.totals.optimizer_bytes < 2 * inspection.totals.file_bytes


def test_a_filter_shows_fewer_rows_and_the_same_totals() -> None:
    whole, filtered = inspect(DIT_2_1), inspect(DIT_2_1, pattern=r"double_blocks\.[01]\.img")
    assert len(filtered.rows) == 10
    assert filtered.totals == whole.totals
    with pytest.raises(HyimgError, match="not a valid regular expression"):
        inspect(DIT_2_1, pattern="(")


def test_inspection_imports_no_torch() -> None:
    code = (
        "import sys; from hyimg.lora.inspection import inspect;"
        "from hyimg.model.architecture import DIT_2_1; inspect(DIT_2_1);"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_weak_update_is_warned_of() -> None:
    (warning,) = inspect(DIT_2_1, dim=32, alpha=2.0).warnings
    assert "makes the update 16 times weaker" in warning
    assert not inspect(DIT_2_1, dim=32, alpha=4.0).warnings
