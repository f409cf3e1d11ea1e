"""Max-norm regularisation, against the products of matrices themselves."""

from __future__ import annotations

import pytest
import torch

from hyimg.checkpoints.names import linear_modules
from hyimg.lora.merging import delta
from hyimg.lora.network import AdapterNetwork, limit_norms
from hyimg.lora.rank_plan import parse_network_args, plan_network
from hyimg.model.dit import DiT


def _network(dit: DiT, *args: str) -> AdapterNetwork:
    """A network whose updates grow with their place in the model."""
    plan = plan_network(linear_modules(dit.arch), dim=3, alpha=1.5, args=parse_network_args(args))
    network = AdapterNetwork.create(dit, plan=plan)
    generator = torch.Generator().manual_seed(0)
    for place, (_, lora) in enumerate(network.adapters()):
        for parameter in lora.lora_up.parameters():
            torch.nn.init.normal_(parameter, std=0.01 * (1 + place), generator=generator)
    return network


@pytest.mark.parametrize("args", [(), ("split_qkv=True",)], ids=["whole", "split"])
def test_updates_beyond_the_norm_are_scaled_to_it_and_the_others_stay(
    lora_dit: DiT, args: tuple[str, ...]
) -> None:
    network = _network(lora_dit, *args)
    before = delta(network)
    norms = {name: float(tensor.norm()) for name, tensor in before.items()}
    limit = sum(sorted(norms.values())[10:12]) / 2
    report = limit_norms(network, limit)
    after = delta(network)
    for name, tensor in after.items():
        expected = before[name] * min(1, limit / norms[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-8)
    new = [float(tensor.norm()) for tensor in after.values()]
    assert report.num_scaled == 32 - 11
    assert report.mean == pytest.approx(sum(new) / len(new), rel=1e-5)
    assert report.largest == pytest.approx(max(new), rel=1e-5)
    assert report.metrics() == {
        "max_norm/keys_scaled": report.num_scaled,
        "max_norm/max_key_norm": report.largest,
        "norm/avg_key_norm": report.mean,
    }


def test_down_and_up_share_the_change(lora_dit: DiT) -> None:
    network = _network(lora_dit)
    (_, lora), *_ = network.adapters()
    down, up = (half.clone() for half in lora.matrices())
    limit_norms(network, 0.25 * float(lora.delta().norm()))
    torch.testing.assert_close(lora.lora_down.weight, down / 2)
    torch.testing.assert_close(lora.lora_up.weight, up / 2)


def test_a_frozen_module_is_left_alone(lora_dit: DiT) -> None:
    network = _network(lora_dit, "network_reg_lrs=linear2=0")
    before = network.state()["lora_unet_single_blocks_1_linear2.lora_up.weight"].clone()
    assert limit_norms(network, 1e-3).num_scaled == 32 - 4
    assert torch.equal(network.state()["lora_unet_single_blocks_1_linear2.lora_up.weight"], before)


def test_fresh_updates_have_no_norm(lora_dit: DiT) -> None:
    report = limit_norms(AdapterNetwork.create(lora_dit), 1.0)
    assert (report.num_scaled, report.mean, report.largest) == (0, 0.0, 0.0)
