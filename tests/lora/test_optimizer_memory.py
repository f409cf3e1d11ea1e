"""The table of optimiser memory against the optimisers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hyimg.checkpoints.names import linear_modules
from hyimg.lora.inspection import TrainedParameter, optimizer_bytes, trained_parameters
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import ModulePlan, parse_network_args, plan_network
from hyimg.model.dit import DiT
from hyimg.plugins import load_plugins
from hyimg.plugins.builtins import OPTIMIZERS
from hyimg.training.optimizers import resolve_optimizer

# a value a tensor (steps, RMS) and the code tables of 8-bit states are left out of the table
NUM_SCALARS = 3


@pytest.fixture
def plans(lora_dit: DiT) -> tuple[ModulePlan, ...]:
    """Ranks that make tensors of more and of less than 4096 values, a frozen and a left-out module, all kinds."""
    args = ["dora=True", "split_qkv=True", "network_reg_dims=img_mod=0,mlp=96", "network_reg_lrs=txt_mod=0"]
    return plan_network(linear_modules(lora_dit.arch), dim=8, args=parse_network_args(args))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_each_built_in_optimiser_keeps_what_the_table_says(
    lora_dit: DiT, plans: tuple[ModulePlan, ...], name: str
) -> None:
    network = AdapterNetwork.create(lora_dit, plan=plans)
    network.attach(lora_dit)
    groups = network.parameter_groups(1e-4)
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert sorted((tuple(p.shape), not p.any()) for p in parameters) == sorted(
        (p.shape, p.starts_at_zero) for p in trained_parameters(plans)
    )
    optimizer = resolve_optimizer(load_plugins(()), name, ())(groups, 1e-4)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    tables = {id(value): value.nbytes for value in tensors if value.shape == (256,)}
    scalars = sum(value.nbytes for value in tensors if value.dim() == 0)
    assert scalars <= 4 * NUM_SCALARS * len(parameters)
    kept = sum(value.nbytes for value in tensors if value.shape != (256,)) - scalars
    assert kept == optimizer_bytes(name.upper(), trained_parameters(plans))
    assert sum(tables.values()) <= 2 * 1024


def test_an_optimiser_that_is_not_known_gets_no_number() -> None:
    assert optimizer_bytes("torch.optim.Rprop", [TrainedParameter((2, 3))]) is None
