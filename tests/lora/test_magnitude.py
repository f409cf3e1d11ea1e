"""DoRA: against its formula, against PEFT's, in files and merged; and rsLoRA's scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyimg.checkpoints.names import linear_modules
from hyimg.config.models import TrainingMemory
from hyimg.config.training import NetworkArgs
from hyimg.lora.files.conversion import convert, read_lora, save_lora
from hyimg.lora.merging import MergingPlacement, merge_into, save_merged
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import parse_network_args, plan_from_state, plan_network
from hyimg.memory.checkpointing import checkpointed
from hyimg.model.dit import DiT
from hyimg.model.layers import Linear
from hyimg.model.loading import WeightPlacement, load_dit
from hyimg.report import SilentReporter

Inputs = tuple[Tensor, Tensor, Any]


def _network(dit: DiT, *, filled: bool = True, **args: bool) -> AdapterNetwork:
    plan = plan_network(linear_modules(dit.arch), dim=3, alpha=2.0, args=NetworkArgs(dora=True, **args))
    network = AdapterNetwork.create(dit, plan=plan)
    network.attach(dit)
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters() if filled else ():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * noise
    return network


def test_a_fresh_dora_does_nothing_bit_for_bit(lora_dit: DiT, inputs: Inputs) -> None:
    with torch.no_grad():
        base = lora_dit(*inputs)
        _network(lora_dit, filled=False)
        assert torch.equal(lora_dit(*inputs), base)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 0.3, 0.0])
def test_output_and_merged_weight_are_the_formulas(lora_dit: DiT, split: bool, multiplier: float) -> None:
    network = _network(lora_dit, split_qkv=split)
    network.set_multiplier(multiplier)
    module, lora = next((m, a) for m, a in network.adapters() if m.name == "single_blocks.1.linear1")
    linear = lora_dit.get_submodule(module.name)
    assert isinstance(linear, Linear)
    assert lora.magnitude is not None
    weight_OI, magnitude_O1 = linear.weight.double(), lora.magnitude.dora_scale.double()
    adapted_OI = weight_OI + lora.delta().double()
    dora_OI = magnitude_O1 * adapted_OI / adapted_OI.norm(dim=1, keepdim=True)
    expected_OI = weight_OI + multiplier * (dora_OI - weight_OI)
    x = torch.randn(2, 7, module.in_features, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ expected_OI.T + linear.bias.double()
    # float32 against float64
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)
    merged_OI = lora.merged(linear.weight, multiplier)
    torch.testing.assert_close(merged_OI.double(), expected_OI, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora_first", [True, False])
def test_beside_another_lora_it_is_merged_as_it_acts(
    lora_dit: DiT, inputs: Inputs, golden: Path, tmp_path: Path, dora_first: bool
) -> None:
    dora = _network(lora_dit)
    dora.detach(lora_dit)
    networks = [(AdapterNetwork.read(golden / "lora_kohya.safetensors", lora_dit.arch), 0.7), (dora, 0.6)]
    networks = networks[::-1] if dora_first else networks
    path, merged_path = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    save_file(lora_dit.state_dict(), path)
    save_merged(path, merged_path, networks, [], SilentReporter())
    placement = MergingPlacement(WeightPlacement("cpu", None), networks)
    for network, multiplier in networks:
        network.set_multiplier(multiplier)
        network.attach(lora_dit)
    with torch.no_grad():
        live = lora_dit(*inputs)
        # float32, two orders of operations
        torch.testing.assert_close(load_dit(path, placement=placement)(*inputs), live, rtol=0, atol=1e-4)
        torch.testing.assert_close(load_dit(merged_path)(*inputs), live, rtol=0, atol=1e-4)


def test_outputs_and_gradients_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40)).requires_grad_(False)
    linear = Linear(24, 40).requires_grad_(False)
    linear.load_state_dict(base[0].state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(base, config)
    layer = theirs.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    nn.init.uniform_(layer.lora_magnitude_vector["default"].weight, 0.5, 1.5)

    from hyimg.lora.adapter import LoRA, Magnitude

    ours = LoRA(24, 40, rank=4, alpha=6)
    ours.magnitude = Magnitude(40)
    ours.magnitude.bind(linear)
    ours.load_matrices(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 6)
    ours.magnitude.load(layer.lora_magnitude_vector["default"].weight[:, None])
    linear.adapters = (ours,)
    x = torch.randn(3, 5, 24)
    mine, other = linear(x), theirs(x)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    mine.square().mean().backward()
    other.square().mean().backward()
    pairs = {
        "down": (ours.lora_down.weight.grad, layer.lora_A["default"].weight.grad),
        "up": (ours.lora_up.weight.grad, layer.lora_B["default"].weight.grad),
        "magnitude": (
            ours.magnitude.dora_scale.grad,
            layer.lora_magnitude_vector["default"].weight.grad[:, None],
        ),
    }
    for name, (own, expected) in pairs.items():
        assert own is not None, name
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-7)


def test_a_bf16_model_is_near_the_float32_one(lora_dit: DiT, inputs: Inputs) -> None:
    latent, timestep, text = inputs
    network = _network(lora_dit)
    with torch.no_grad():
        whole = lora_dit(latent, timestep, text)
        network.set_multiplier(0)
        base = lora_dit(latent, timestep, text)
        network.set_multiplier(1)
        network.detach(lora_dit)
        lora_dit.bfloat16()
        network.attach(lora_dit)
        half = lora_dit(latent.bfloat16(), timestep, text.to("cpu", torch.bfloat16)).float()
    # bf16's own rounding through six blocks, against what the adapter changes
    assert float((half - whole).norm() / whole.norm()) < 0.05 < float((whole - base).norm() / whole.norm())


def test_a_dora_is_saved_read_and_renamed(lora_dit: DiT, inputs: Inputs, tmp_path: Path) -> None:
    network = _network(lora_dit)
    with torch.no_grad():
        live = lora_dit(*inputs)
        network.detach(lora_dit)
        save_lora(tmp_path / "lora.safetensors", network.state(), {}, dtype=torch.float32)
        convert(tmp_path / "lora.safetensors", tmp_path / "comfy.safetensors", to="comfy")
        state = read_lora(tmp_path / "comfy.safetensors")
        assert state["lora_unet_single_blocks_1_linear1.dora_scale"].shape == (7 * 96, 1)
        read = AdapterNetwork.read(tmp_path / "comfy.safetensors", lora_dit.arch)
        read.attach(lora_dit)
        assert torch.equal(lora_dit(*inputs), live)
        read.detach(lora_dit)
        merge_into(lora_dit, read)
        torch.testing.assert_close(lora_dit(*inputs), live, rtol=1e-5, atol=2e-5)


def test_gradient_checkpointing_changes_no_bit(lora_dit: DiT, inputs: Inputs) -> None:
    network = _network(lora_dit, split_qkv=True)
    gradients = []
    for _ in range(2):
        lora_dit(*inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        network.zero_grad(set_to_none=True)
        lora_dit.run_block = checkpointed(
            lora_dit.run_block, TrainingMemory(gradient_checkpointing=True), lora_dit.device
        )
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_magnitudes_are_a_group_without_weight_decay(lora_dit: DiT) -> None:
    network = _network(lora_dit)
    plain, magnitudes = network.parameter_groups(1e-3)
    assert "weight_decay" not in plain
    assert magnitudes["weight_decay"] == 0
    shapes = {tuple(parameter.shape[1:]) for parameter in magnitudes["params"]}
    assert (len(magnitudes["params"]), shapes) == (32, {(1,)})


def test_rslora_writes_an_alpha_that_gives_alpha_by_the_root_of_the_rank(lora_dit: DiT) -> None:
    modules = linear_modules(lora_dit.arch)
    args = parse_network_args(["rslora=True", "network_reg_dims=img_attn=16"])
    network = AdapterNetwork.create(lora_dit, plan=plan_network(modules, dim=9, alpha=2.0, args=args))
    for module, lora in network.adapters():
        assert lora.scale == pytest.approx(2 / math.sqrt(lora.rank))
        alpha = network.state()[f"{module.lora_name}.alpha"]
        assert float(alpha) / lora.rank == pytest.approx(2 / math.sqrt(lora.rank))
    assert {lora.rank for _, lora in network.adapters()} == {9, 16}
    again = plan_from_state(modules, network.state(), args)
    assert [m.alpha for m in again if m.rank] == pytest.approx([lora.alpha for _, lora in network.adapters()])
