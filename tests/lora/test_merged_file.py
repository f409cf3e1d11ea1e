"""A merged model's file: the source's names, types and layout, whichever they are."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.lora.merging import MergingPlacement, save_merged
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT
from hyimg.model.loading import WeightPlacement, load_dit
from hyimg.report import SilentReporter


@pytest.fixture
def networks(golden: Path, lora_dit: DiT) -> list[tuple[AdapterNetwork, float]]:
    """Two files of different formats with multipliers of their own."""
    files = [golden / "lora_kohya.safetensors", golden / "lora_dpipe.safetensors"]
    return [(AdapterNetwork.read(path, lora_dit.arch), 0.7 - i) for i, path in enumerate(files)]


def in_diffusers_names(golden: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in diffusers' names, q, k and v apart and the final adaLN's halves swapped."""
    rows = json.loads((golden / "keymap.json").read_text(encoding="utf-8"))["weights"]
    result = {}
    for row in rows:
        tensor = state.get(row["original"])
        if tensor is None:
            continue
        if "row_order" in row["diffusers"][0]:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        heights = [part.get("rows", [0, row["shape"][0]]) for part in row["diffusers"]]
        sizes = [(end - start) * len(tensor) // row["shape"][0] for start, end in heights]
        for part, piece in zip(row["diffusers"], tensor.split(sizes), strict=True):
            result[part["name"]] = piece.contiguous()
    return result


def write_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", ["original", "prefixed", "compiled", "diffusers shards"])
def test_a_merged_file_loads_as_the_model_that_is_merged_while_it_loads(
    golden: Path, lora_dit: DiT, tmp_path: Path, networks: list[tuple[AdapterNetwork, float]], form: str
) -> None:
    state = {name: tensor.bfloat16() for name, tensor in lora_dit.state_dict().items()}
    # a file may mix types: this weight stays float32
    state["double_blocks.0.img_attn_proj.weight"] = lora_dit.state_dict()[
        "double_blocks.0.img_attn_proj.weight"
    ]
    path = tmp_path / "dit.safetensors"
    if form == "diffusers shards":
        state = in_diffusers_names(golden, state)
        path = write_shards(tmp_path / "dit", state)
    else:
        prefix = {"prefixed": "model.diffusion_model.", "compiled": "module._orig_mod."}.get(form, "")
        inner = "blocks.0._orig_mod." if form == "compiled" else "blocks.0."
        state = {prefix + name.replace("blocks.0.", inner): tensor for name, tensor in state.items()}
        save_file(state, path)
    merged_path = tmp_path / "merged.safetensors"
    save_merged(path, merged_path, networks, [{"file": "a"}], SilentReporter())

    merged = load_file(merged_path)
    assert {name: (t.dtype, t.shape) for name, t in merged.items()} == {
        name: (t.dtype, t.shape) for name, t in state.items()
    }
    expected = load_dit(path, placement=MergingPlacement(WeightPlacement("cpu", None), networks)).state_dict()
    before = load_dit(path).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in expected.items())
    for name, tensor in load_dit(merged_path).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype


def test_a_failure_on_the_way_leaves_no_file(
    lora_dit: DiT,
    tmp_path: Path,
    networks: list[tuple[AdapterNetwork, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, merged_path = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    save_file(lora_dit.state_dict(), path)
    before = path.read_bytes()

    def full(*_: object) -> Iterator[bytes]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hyimg.lora.merging.stored_chunks", full)
    with pytest.raises(HyimgError, match="the disk is full"):
        save_merged(path, merged_path, networks, [], SilentReporter())
    assert [p.name for p in tmp_path.iterdir()] == ["dit.safetensors"]
    assert path.read_bytes() == before


def test_memory_holds_a_few_tensors_and_not_the_model(
    tmp_path: Path, lora_dit: DiT, networks: list[tuple[AdapterNetwork, float]]
) -> None:
    """Counts the bytes that Python asks for: what is read, and what is copied, a megabyte at a time."""
    state = {name: tensor.clone() for name, tensor in lora_dit.state_dict().items()}
    path = tmp_path / "dit.safetensors"
    save_file(state, path)
    largest = max(tensor.nbytes for tensor in state.values())
    tracemalloc.start()
    save_merged(path, tmp_path / "merged.safetensors", networks, [], SilentReporter())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = path.stat().st_size
    assert total > 20 * largest
    assert peak < 4 * largest, (peak, largest)
