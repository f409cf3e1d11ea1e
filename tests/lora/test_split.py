"""`split_qkv`: adapters for the parts of fused weights, and how a file holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyimg.checkpoints.architecture import DIT_2_1
from hyimg.checkpoints.names import linear_modules
from hyimg.config.training import NetworkArgs
from hyimg.errors import HyimgError
from hyimg.lora.adapter import SplitLoRA
from hyimg.lora.files.conversion import convert, save_lora
from hyimg.lora.merging import delta
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import plan_from_state, plan_network
from hyimg.model.dit import DiT

Inputs = tuple[Tensor, Tensor, Any]
SPLIT = NetworkArgs(split_qkv=True)


@pytest.fixture
def network(lora_dit: DiT) -> AdapterNetwork:
    """A split network of rank 3 and alpha 1.5 with random weights."""
    plan = plan_network(linear_modules(lora_dit.arch), dim=3, alpha=1.5, args=SPLIT)
    network = AdapterNetwork.create(lora_dit, plan=plan)
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def test_q_k_v_and_the_mlp_of_the_full_model_are_the_references_row_ranges() -> None:
    plan = plan_network(linear_modules(DIT_2_1), args=SPLIT)
    parts = {module.name.split(".", 2)[2]: module.parts for module in plan if module.parts}
    qkv = (3584, 3584, 3584)
    assert parts == {"img_attn_qkv": qkv, "txt_attn_qkv": qkv, "linear1": (*qkv, 14336)}
    fused = next(module for module in plan if module.name == "single_blocks.0.linear1")
    assert fused.num_values == 4 * (4 * 3584 + (3 * 3584 + 14336))  # downs, then rows of up
    assert fused.num_file_values == 4 * 4 * (3584 + 3 * 3584 + 14336)


def test_each_part_has_its_own_pair_and_each_fresh_down_its_own_draw(lora_dit: DiT) -> None:
    plan = plan_network(linear_modules(lora_dit.arch), args=SPLIT)
    network = AdapterNetwork.create(lora_dit, plan=plan)
    split = [lora for _, lora in network.adapters() if isinstance(lora, SplitLoRA)]
    assert len(split) == 2 * 2 + 4
    q, k, v = split[0].lora_down.parameters()
    assert not torch.equal(q, k)
    assert not torch.equal(k, v)
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.2.weight" in dict(network.named_parameters())


def test_a_file_means_what_was_trained(
    network: AdapterNetwork, lora_dit: DiT, inputs: Inputs, tmp_path: Path
) -> None:
    save_lora(tmp_path / "lora.safetensors", network.state())
    read = AdapterNetwork.read(tmp_path / "lora.safetensors", lora_dit.arch)
    assert not any(isinstance(lora, SplitLoRA) for _, lora in read.adapters())
    ours, theirs = delta(network), delta(read)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])  # one product against a sum of three
    ranks = {lora.rank: lora.alpha for _, lora in read.adapters()}
    assert ranks == {3: 1.5, 9: 4.5, 12: 6.0}
    outputs = []
    for one in (network, read):
        one.attach(lora_dit)
        with torch.no_grad():
            outputs.append(lora_dit(*inputs))
        one.detach(lora_dit)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=2e-5)  # float32 through six blocks


def test_the_update_is_the_delta_times_the_input(network: AdapterNetwork) -> None:
    module, lora = next((m, a) for m, a in network.adapters() if m.name == "single_blocks.1.linear1")
    x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0))
    y = lora(x, torch.zeros(2, 5, module.out_features))
    torch.testing.assert_close(y, x @ lora.delta().T, rtol=1e-5, atol=1e-6)


def test_a_split_file_goes_on_as_a_split_network(
    network: AdapterNetwork, lora_dit: DiT, tmp_path: Path
) -> None:
    state = network.state()
    plan = plan_from_state(linear_modules(lora_dit.arch), state, SPLIT)
    assert {(module.rank, module.alpha) for module in plan} == {(3, 1.5)}
    again = AdapterNetwork.create(lora_dit, plan=plan)
    again.load_state(state)
    assert {(lora.rank, lora.alpha) for _, lora in again.adapters()} == {(3, 1.5)}
    parameters = dict(network.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_a_split_file_converts_to_every_form(network: AdapterNetwork, lora_dit: DiT, tmp_path: Path) -> None:
    save_lora(tmp_path / "lora.safetensors", network.state(), {})
    expected = delta(network)
    for form in ("comfy", "peft", "diffusers"):
        convert(tmp_path / "lora.safetensors", tmp_path / f"{form}.safetensors", to=form)
        found = delta(AdapterNetwork.read(tmp_path / f"{form}.safetensors", lora_dit.arch))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_file_that_is_not_split_is_refused_by_a_split_network(lora_dit: DiT) -> None:
    whole = AdapterNetwork.create(lora_dit, rank=12)
    for _, lora in whole.adapters():
        torch.nn.init.ones_(lora.lora_up.weight)
    plan = plan_from_state(linear_modules(lora_dit.arch), whole.state(), SPLIT)
    with pytest.raises(HyimgError, match=r"img_attn_qkv` is one adapter for all rows"):
        AdapterNetwork(plan).load_state(whole.state())
    odd = AdapterNetwork.create(lora_dit, rank=4).state()
    with pytest.raises(HyimgError, match=r"the rank 4 of `double_blocks.0.img_attn_qkv` is no multiple of 3"):
        plan_from_state(linear_modules(lora_dit.arch), odd, SPLIT)
