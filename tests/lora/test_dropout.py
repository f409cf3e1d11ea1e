"""Dropout of adapters: where it acts, what it keeps, and what its masks depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hyimg.checkpoints.names import linear_modules
from hyimg.config.models import TrainingMemory
from hyimg.config.training import NetworkArgs
from hyimg.lora.adapter import LoRA
from hyimg.lora.base import Dropout, DropoutRates
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import plan_network
from hyimg.memory.checkpointing import checkpointed
from hyimg.model.dit import DiT

Inputs = tuple[Tensor, Tensor, Any]

# Images, tokens and ranks enough to know a share of 0.25 to 0.02
B, L, R = 64, 32, 40


def _lora(key: tuple[object, ...] | None = (0, 1, 0), **rates: float) -> LoRA:
    """An adapter that gives down(x), by an up of ones on the diagonal, at a scale of 1."""
    lora = LoRA(R, R, rank=R, alpha=R)
    with torch.no_grad():
        lora.lora_down.weight.copy_(torch.eye(R))
        lora.lora_up.weight.copy_(torch.eye(R))
    lora.dropout = Dropout(DropoutRates(**rates), "module", key)
    return lora


def _update(lora: LoRA, *shape: int) -> Tensor:
    """What the adapter adds for an input of ones; the first of `shape` are the images."""
    assert lora.dropout is not None
    lora.dropout.num_images = shape[0]
    with torch.no_grad():
        update: Tensor = lora(torch.ones(math.prod(shape), R), torch.zeros(math.prod(shape), R))
    return update.view(*shape, R)


def test_dropout_drops_values_and_makes_up_for_them() -> None:
    update_BLR = _update(_lora(dropout=0.25), B, L)
    assert sorted(update_BLR.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert float((update_BLR == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert (update_BLR == 0).float().mean((0, 2)).std() > 0, "each token has values of its own dropped"


def test_rank_dropout_drops_the_same_ranks_of_all_tokens_of_an_image() -> None:
    update_BLR = _update(_lora(rank=0.25), B, L)
    assert torch.equal(update_BLR, update_BLR[:, :1].expand_as(update_BLR))
    assert sorted(update_BLR.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert float((update_BLR == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(update_BLR[0], update_BLR[1]), "each image has ranks of its own"
    assert _update(_lora(rank=0.25), B).shape == (B, R), "the modulation's input has no tokens"


def test_module_dropout_leaves_out_the_whole_adapter_and_makes_up_for_nothing() -> None:
    updates = [_update(_lora((0, step, 0), module=0.25), 2, 3) for step in range(400)]
    assert {tuple(update.unique().tolist()) for update in updates} == {(0.0,), (1.0,)}
    assert sum(not update.any() for update in updates) / 400 == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize("kind", ["dropout", "rank"])
def test_masks_follow_from_seed_step_batch_and_module_alone(kind: str) -> None:
    def mask(*key: object, module: str = "module") -> Tensor:
        lora = _lora(key, **{kind: 0.5})
        assert lora.dropout is not None
        lora.dropout.module = module
        return _update(lora, B, L)

    torch.manual_seed(0)
    first = mask(0, 1, 0)
    torch.manual_seed(1)
    assert torch.equal(mask(0, 1, 0), first)
    for other in (mask(1, 1, 0), mask(0, 2, 0), mask(0, 1, 1), mask(0, 1, 0, module="another")):
        assert not torch.equal(other, first)


def test_without_a_key_nothing_is_dropped() -> None:
    assert bool((_update(_lora(None, dropout=0.9, rank=0.9, module=0.9), B, L) == 1).all())


def test_the_parts_of_a_split_module_have_masks_of_their_own(lora_dit: DiT) -> None:
    args = NetworkArgs(split_qkv=True)
    network = AdapterNetwork.create(lora_dit, plan=plan_network(linear_modules(lora_dit.arch), args=args))
    split = next(lora for module, lora in network.adapters() if module.parts)
    network.set_dropout(DropoutRates(rank=0.5))
    network.set_dropout_key(0, 1, 0)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.fill_(1.0)
        hidden = lora_dit.arch.hidden
        assert split.dropout is not None
        split.dropout.num_images = B
        q, k, v = split.product(torch.ones(B, hidden), split.dropout).split(hidden, dim=1)
    assert not torch.equal(q, k)
    assert not torch.equal(k, v)


def test_gradient_checkpointing_meets_the_same_masks_again(lora_dit: DiT, inputs: Inputs) -> None:
    network = AdapterNetwork.create(lora_dit, rank=2)
    for _, lora in network.adapters():
        torch.nn.init.normal_(lora.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    network.set_dropout(DropoutRates(dropout=0.3, rank=0.3, module=0.3))
    network.attach(lora_dit)
    gradients = []
    for key in ((0, 1, 0), (0, 2, 0)):
        network.set_dropout_key(*key)
        lora_dit(*inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        network.zero_grad(set_to_none=True)
    lora_dit.run_block = checkpointed(
        lora_dit.run_block, TrainingMemory(gradient_checkpointing=True), lora_dit.device
    )
    network.set_dropout_key(0, 1, 0)
    lora_dit(*inputs).square().mean().backward()
    again = [parameter.grad for parameter in network.parameters()]
    assert _equal(again, gradients[0])
    assert not _equal(again, gradients[1])
    assert any(gradient is None for gradient in again), "of a module that was left out"


def _equal(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        torch.equal(a, b) if a is not None and b is not None else a is b
        for a, b in zip(one, other, strict=True)
    )
