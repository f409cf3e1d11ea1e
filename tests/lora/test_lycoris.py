"""LoHa and LoKr: LyCORIS's own numbers, live, merged, carried by a change of names, and made plain LoRAs of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyimg.checkpoints.safetensors_file import read_header
from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA
from hyimg.lora.files.conversion import convert, merge, read_adapters, read_lora
from hyimg.lora.files.formats import parse_key
from hyimg.lora.files.stored import LoRAFile
from hyimg.lora.lycoris import LoHa, LoKr
from hyimg.lora.merging import merge_into
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT

Load = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
Products = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

CASES = {"loha": LoHa, "lokr_full_w1": LoKr, "lokr_both_low": LoKr, "lokr_full": LoKr}
FC1, QKV, LINEAR1 = "double_blocks.0.img_mlp.fc1", "double_blocks.1.txt_attn_qkv", "single_blocks.2.linear1"


def _state(kind: str, shape: tuple[int, int], factor: int = 6) -> dict[str, Tensor]:
    """Random tensors of an adapter by role."""
    (rows, columns), rank = shape, 3
    if kind == "loha":
        state = {f"hada_{w}_a": torch.randn(rows, rank) for w in ("w1", "w2")}
        state |= {f"hada_{w}_b": torch.randn(rank, columns) for w in ("w1", "w2")}
        return state | {"alpha": torch.tensor(1.5)}
    state = {"lokr_w1": torch.randn(factor, factor), "alpha": torch.tensor(1.5)}
    if kind == "lokr_full":
        return state | {"lokr_w2": torch.randn(rows // factor, columns // factor)}
    return state | {
        "lokr_w2_a": torch.randn(rows // factor, rank),
        "lokr_w2_b": torch.randn(rank, columns // factor),
    }


def _delta(state: Mapping[str, Tensor]) -> Tensor:
    """The update by the formula, in double precision."""
    s = {role: tensor.double() for role, tensor in state.items()}
    if "hada_w1_a" in s:
        return s["alpha"] / 3 * (s["hada_w1_a"] @ s["hada_w1_b"]) * (s["hada_w2_a"] @ s["hada_w2_b"])
    if "lokr_w2" in s:
        return torch.kron(s["lokr_w1"], s["lokr_w2"])
    return s["alpha"] / 3 * torch.kron(s["lokr_w1"], s["lokr_w2_a"] @ s["lokr_w2_b"])


def _names(module: str, name: str) -> bool:
    """Whether a name of the written file is the module's."""
    key = parse_key(f"{name}.alpha")
    return key is not None and key.module == module


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file with a LoHa, two LoKrs and a plain LoRA, and the updates in double precision."""
    torch.manual_seed(3)
    shapes = {FC1: (384, 96), QKV: (288, 96), LINEAR1: (672, 96)}
    kinds = {FC1: "loha", QKV: "lokr_low", LINEAR1: "lokr_full"}
    states = {name: _state(kinds[name], shape) for name, shape in shapes.items()}
    deltas = {name: _delta(state) for name, state in states.items()}
    plain = {"lora_down.weight": torch.randn(4, 96), "lora_up.weight": torch.randn(96, 4)}
    states["double_blocks.0.img_attn_proj"] = plain
    deltas["double_blocks.0.img_attn_proj"] = (plain["lora_up.weight"] @ plain["lora_down.weight"]).double()
    named = {
        f"lora_unet_{name.replace('.', '_')}.{role}": tensor
        for name, state in states.items()
        for role, tensor in state.items()
    }
    save_file(named, tmp_path / "mixed.safetensors")
    return tmp_path / "mixed.safetensors", deltas


@pytest.mark.parametrize("name", CASES)
def test_updates_are_lycoris_own_numbers(
    golden: Path, load: Load, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyimg.lora.lycoris.ROWS_AT_A_TIME", 10)
    tensors, _ = load(golden / "lycoris.safetensors")
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    delta, y = own.pop("delta"), own.pop("y")
    adapter = CASES[name].from_tensors(own)
    torch.testing.assert_close(adapter.delta(), delta, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter(tensors["x"], torch.zeros(5, 36)), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter.delta_rows(slice(10, 23)), delta[10:23], rtol=0, atol=1e-5)
    assert float(adapter.update_norm()) == pytest.approx(float(delta.norm()), rel=1e-5)
    adapter.multiplier = -0.5
    beside = torch.randn(5, 36)
    torch.testing.assert_close(adapter(tensors["x"], beside.clone()), beside - 0.5 * y, rtol=0, atol=1e-5)


def test_a_mixed_file_acts_live_as_it_does_merged(
    mixed: tuple[Path, dict[str, Tensor]], lora_dit: DiT, inputs: tuple[Tensor, Tensor, object]
) -> None:
    path, deltas = mixed
    network = AdapterNetwork.read(path, lora_dit.arch)
    assert {module.name for module, _ in network.adapters()} == deltas.keys()
    network.set_multiplier(0.02)
    network.attach(lora_dit)
    with torch.no_grad():
        base_weight = lora_dit.get_parameter(f"{FC1}.weight").clone()
        live = lora_dit(*inputs)
        network.detach(lora_dit)
        base = lora_dit(*inputs)
        merge_into(lora_dit, network, 0.02)
        merged = lora_dit(*inputs)
    change = lora_dit.get_parameter(f"{FC1}.weight") - base_weight
    torch.testing.assert_close(change.double(), 0.02 * deltas[FC1], rtol=0, atol=1e-5)
    assert (live - base).abs().max() > 0.01
    torch.testing.assert_close(live, merged, rtol=0, atol=1e-4)  # float32, two orders of operations


def test_loha_and_lokr_are_carried_by_a_change_of_names(
    mixed: tuple[Path, dict[str, Tensor]], tmp_path: Path, load: Load
) -> None:
    path, _ = mixed
    comfy, back = tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"
    convert(path, comfy, to="comfy")
    assert "lora_unet_double_blocks_0_img_mlp_0.hada_w1_a" in read_header(comfy).tensors
    assert "lora_unet_double_blocks_1_txt_attn_qkv.lokr_w2_b" in read_header(comfy).tensors
    convert(comfy, back, to="kohya")
    ours, theirs = load(back)[0], load(path)[0]
    added = {"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(4.0)}
    assert ours.keys() == theirs.keys() | added.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in (theirs | added).items())


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lycoris_", "transformer.", ""])
def test_their_names_are_known_under_every_prefix(tmp_path: Path, prefix: str) -> None:
    name = "double_blocks.0.img_mlp.0"
    name = name.replace(".", "_") if prefix == "lycoris_" else name
    state = {f"{prefix}{name}.{role}": t for role, t in _state("lokr_low", (384, 96)).items()}
    save_file(state, tmp_path / "lokr.safetensors")
    ((name, update),) = read_adapters(tmp_path / "lokr.safetensors")
    assert isinstance(update, LoKr)
    assert name == FC1
    convert(tmp_path / "lokr.safetensors", tmp_path / "kohya.safetensors", to="kohya")
    ((_, again),) = read_adapters(tmp_path / "kohya.safetensors")
    assert torch.equal(again.delta(), update.delta())


@pytest.mark.parametrize("target", ["kohya", "diffusers"])
def test_a_full_rank_makes_the_very_same_lora_of_them(
    mixed: tuple[Path, dict[str, Tensor]], tmp_path: Path, target: str
) -> None:
    path, deltas = mixed
    dst = tmp_path / "lora.safetensors"
    if target == "kohya":
        # kohya could carry them: a LoRA is made where they are added to something
        merge([(path, 0.5), (path, 0.5)], dst, max_rank=96)
    else:
        convert(path, dst, to=target, max_rank=96)
    for name, update in read_adapters(dst):
        assert isinstance(update, LoRA)
        whole = update.delta_rows(slice(None)).double()
        error = (whole - deltas[name]).norm() / deltas[name].norm()
        assert error < 1e-6, name


@pytest.mark.parametrize("merged", [False, True], ids=["alone", "added"])
def test_a_lower_rank_is_the_best_there_is_and_its_error_is_told(
    mixed: tuple[Path, dict[str, Tensor]], tmp_path: Path, merged: bool
) -> None:
    path, deltas = mixed
    if merged:
        done = merge([(path, 1.0), (path, 1.0)], tmp_path / "lora.safetensors", max_rank=8)
    else:
        done = convert(path, tmp_path / "lora.safetensors", to="peft", max_rank=8)
    names = list(done.errors)
    squares = []
    for name, update in read_adapters(tmp_path / "lora.safetensors"):
        whole, delta = update.delta_rows(slice(None)).double(), (2 if merged else 1) * deltas[name]
        singular = torch.linalg.svdvals(delta)
        best = float((singular[8:] ** 2).sum().sqrt() / singular.norm())
        error = float((whole - delta).norm() / delta.norm())
        assert error == pytest.approx(best, abs=1e-6), name
        if name in (FC1, QKV, LINEAR1):  # the plain LoRA has the rank 4 + 4 and stays as it is
            (told,) = (done.errors[written] for written in names if _names(name, written))
            assert told == pytest.approx(error, abs=1e-6)
            squares.append((error * float(delta.norm()), float(delta.norm())))
    assert len(done.errors) == len(squares) == 3
    errors, norms = (sum(pair[i] ** 2 for pair in squares) for i in (0, 1))
    assert done.error == pytest.approx((errors / norms) ** 0.5, rel=1e-5)


def test_what_cannot_hold_them_says_so(mixed: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, _ = mixed
    for target in ("peft", "diffusers"):
        with pytest.raises(HyimgError, match=r"belongs to a LoHa, which .* cannot hold") as error:
            convert(path, tmp_path / "dst.safetensors", to=target)
        assert error.value.hint is not None
        assert "--max_rank" in error.value.hint
    with pytest.raises(HyimgError, match="a plain LoRA is needed"):
        read_lora(path)
    with pytest.raises(HyimgError, match="cannot become a part of another adapter"):
        merge([(path, 1.0), (path, 1.0)], tmp_path / "dst.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["mixed.safetensors"]


BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a part is missing": ({"lokr_w2_b": None}, "incomplete: .*lokr_w2_b of"),
    "a Tucker core": ({"lokr_t2": torch.zeros(3, 3, 1, 1)}, "Tucker decomposition"),
    "two kinds": ({"lora_down.weight": torch.zeros(2, 96)}, "and those of a LoKr"),
    "misshapen": ({"lokr_w2_b": torch.zeros(4, 16)}, "do not form a matrix product"),
    "of another width": ({"lokr_w1": torch.zeros(6, 5)}, "80 wide where|is 384 wide where"),
    "DoRA": ({"dora_scale": torch.ones(384, 1)}, "belongs to a LoHa or LoKr with DoRA"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_lokr_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    changes, words = BROKEN[case]
    state = {**_state("lokr_low", (384, 96)), **changes}
    named = {f"lora_unet_double_blocks_0_img_mlp_fc1.{role}": t for role, t in state.items() if t is not None}
    other = "lora_unet_double_blocks_0_img_attn_proj"
    named |= {f"{other}.lora_down.weight": torch.zeros(2, 96), f"{other}.lora_up.weight": torch.zeros(96, 2)}
    save_file(named, tmp_path / "lokr.safetensors")
    with pytest.raises(HyimgError, match=words):
        read_lora(LoRAFile.open(tmp_path / "lokr.safetensors"), lycoris=True)


def test_a_lokr_of_another_model_does_not_fit(
    mixed: tuple[Path, dict[str, Tensor]], tmp_path: Path, lora_dit: DiT
) -> None:
    path = tmp_path / "lokr.safetensors"
    for name, shape, words in (
        ("single_blocks.0.linear2", (96, 600), r"has the shape \[96, 600\], not \[96, 480\]"),
        ("single_blocks.30.linear2", (96, 480), "none of its modules is in the model"),
    ):
        state = _state("lokr_full", shape)
        save_file({f"diffusion_model.{name}.{role}": tensor for role, tensor in state.items()}, path)
        with pytest.raises(HyimgError, match=words):
            AdapterNetwork.read(path, lora_dit.arch)
