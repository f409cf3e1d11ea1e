"""The LoRA adapter of one Linear: y + multiplier * alpha/rank * up(down(x)) (Hu et al. 2021, section 4.1).

Precision. The weights are float32 parameters, so that small optimiser steps are not lost. Both products run
in the dtype of the input x: under a bf16 model the weights are cast to bf16 on the way in and the casts'
gradients are float32 again, which is the product that the reference tool gets from bf16 autocast. The scale
is multiplied into `up` before its cast, and the second product is added to y inside its kernel, in float32 and
rounded once, where the reference rounds the update and then the scaled update. In a float32 model all is float32.

Memory. Nothing of the base output's size is made: the update goes straight into y.

Shapes: P tokens, I input features, O output features, R rank
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.randomness import keyed_generator


class LoRA(nn.Module):
    """Two trainable matrices, `lora_down.weight` (R, I) and `lora_up.weight` (O, R), beside a frozen Linear.

    It is one of `hyimg.model.layers.Linear.adapters`. `alpha` and `multiplier` are plain numbers, so that
    the forward pass never waits for the device to read them; with a multiplier of 0 the output is the base's,
    bit for bit. A fresh adapter has an up of zeros and does nothing.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        assert rank > 0
        self.rank = rank
        self.alpha = alpha
        self.multiplier = 1.0
        self.lora_down = _weight_only(in_features, rank)
        self.lora_up = _weight_only(rank, out_features)

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    def forward(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        """Adds the update for the input x (P, I) to the base layer's output y (P, O), in place."""
        if self.multiplier == 0:
            return y_PO
        down_RI = self.lora_down.weight.to(x_PI.dtype)
        up_OR = (self.lora_up.weight * (self.multiplier * self.scale)).to(x_PI.dtype)
        return y_PO.addmm_(F.linear(x_PI, down_RI), up_OR.t())

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """Kaiming-uniform down, that is within +-1/sqrt(I), and zero up, as the reference tool.

        Drawn from a generator keyed by `key`, say (seed, module name): the same whatever else is drawn.
        """
        nn.init.kaiming_uniform_(
            self.lora_down.weight, a=math.sqrt(5), generator=keyed_generator(*key, "lora_down")
        )
        nn.init.zeros_(self.lora_up.weight)

    @torch.no_grad()
    def delta(self, device: torch.device | None = None) -> Tensor:
        """What merging adds to the base weight at a multiplier of 1: alpha/rank * up @ down.

        Float32 (O, I), computed on `device`, by default where the adapter is.
        """
        up_OR, down_RI = (half.weight.to(device, torch.float32) for half in (self.lora_up, self.lora_down))
        return (up_OR @ down_RI) * self.scale


def _weight_only(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free float32 Linear of zeros on the CPU, made without a draw from torch's global generator."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.float32)
    linear.weight = nn.Parameter(torch.zeros(out_features, in_features))
    return linear
