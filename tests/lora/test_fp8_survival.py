"""What of a LoRA survives being merged into an fp8 base, and the updates that it is asked about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyimg.lora.adapter import LoRA
from hyimg.lora.files import compatibility
from hyimg.lora.files.compatibility import Survival, report_module, survival, total
from hyimg.lora.files.conversion import read_adapters
from hyimg.memory.fp8 import dequantize, quantize


def made(scale: float, *, alpha: float = 2.0) -> tuple[Tensor, LoRA]:
    """A bf16 weight of a size that trained ones have, and an update of `scale` times that size."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(96, 256, generator=generator)).bfloat16()
    down, up = torch.randn(4, 256, generator=generator), torch.randn(96, 4, generator=generator)
    size = (weight.float().norm() / (up @ down).norm()).item() * 4 / alpha
    tensors = {"lora_down.weight": down, "lora_up.weight": up * size * scale, "alpha": torch.tensor(alpha)}
    return weight, LoRA.from_tensors(tensors)


def test_survival_is_the_squared_cosine_of_what_merging_changes() -> None:
    weight, update = made(0.1)
    wanted = update.delta()
    merged = (weight.float() + wanted).bfloat16()
    before, after = (dequantize(*quantize(w), torch.float32) for w in (weight, merged))
    change = after - before
    cosine = torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0)
    found = survival(weight, update)
    assert found.share == pytest.approx(float(cosine) ** 2, rel=1e-4)
    assert found.relative_error == pytest.approx(float((change - wanted).norm() / wanted.norm()), rel=1e-4)


def test_a_large_update_survives_and_a_small_one_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [survival(*made(scale)).share for scale in (3.0, 0.3, 0.03, 0.003)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[-1] < 0.2
    assert survival(*made(0.003)).relative_error > 1, "what is left is mostly noise"
    monkeypatch.setattr(compatibility, "_CHUNK_VALUES", 256)
    assert survival(*made(0.3)).share == pytest.approx(shares[1], rel=1e-5), "row by row"


def test_an_update_of_nothing_is_no_division_by_zero() -> None:
    weight, update = made(0.0)
    assert survival(weight, update) == Survival(0.0, 0.0, 0.0, 0.0)
    assert (Survival().share, Survival().relative_error) == (0.0, 0.0)


def test_modules_add_up_by_their_size() -> None:
    large, small = survival(*made(3.0)), survival(*made(0.003))
    both = total([large, small])
    assert both.update == large.update + small.update
    assert both.share == pytest.approx(large.share, abs=1e-3), "the small update hardly counts"


@pytest.mark.parametrize("file", ["kohya", "comfy", "dpipe", "diffusers"])
def test_updates_are_the_deltas_whatever_the_format(golden: Path, load, file: str) -> None:
    deltas, _ = load(golden / "lora_deltas.safetensors")
    updates = {
        f"{name}.weight": update for name, update in read_adapters(golden / f"lora_{file}.safetensors")
    }
    for name, update in updates.items():
        assert torch.allclose(update.delta_rows(slice(None)), deltas[name], atol=1e-6)
        assert torch.equal(update.delta_rows(slice(3, 7)), update.delta_rows(slice(None))[3:7])
        report = report_module(name, update)
        assert report.norm == pytest.approx(float(deltas[name].norm()), rel=1e-5)
    assert set(updates) == set(deltas)


def test_a_value_that_is_not_finite_is_found_wherever_it_is() -> None:
    for half in ("lora_down", "lora_up"):
        _, update = made(1.0)
        update.get_parameter(f"{half}.weight")[1, 1] = torch.nan
        assert report_module("m", update).norm is None
    assert report_module("m", made(1.0, alpha=float("inf"))[1]).norm is None
