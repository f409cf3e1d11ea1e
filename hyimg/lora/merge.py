"""LoRA merged into the base weights: the same function as the live adapter, at no cost per step.

Shapes: I input features, O output features
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hyimg.lora.network import LoRANetwork
from hyimg.model.dit import DiT


def delta(network: LoRANetwork) -> Mapping[str, Tensor]:
    """What a network adds to each weight at a multiplier of 1, float32 (O, I), by the DiT's name of it.

    Equal to tests/golden/lora_deltas.safetensors for the LoRA files beside it.
    """
    return {f"{module.name}.weight": lora.delta() for module, lora in network.adapters()}


@torch.no_grad()
def merge_into(dit: DiT, network: LoRANetwork, multiplier: float = 1.0) -> None:
    """Adds `multiplier` times the network's deltas to the DiT's weights, in place, one module at a time.

    The sum is made in float32 on the weight's device and rounded once to the weight's dtype. The network is
    not attached by this, and must not be attached as well. Its own multipliers are not looked at.
    """
    for module, lora in network.adapters():
        weight_OI = dit.get_parameter(f"{module.name}.weight")
        weight_OI.copy_(weight_OI.float() + multiplier * lora.delta(weight_OI.device))
