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

from hyimg.lora.dropout import Dropout
from hyimg.lora.magnitude import Magnitude
from hyimg.randomness import keyed_generator


class LoRA(nn.Module):
    """Two trainable matrices, `lora_down.weight` (R, I) and `lora_up.weight` (O, R), beside a frozen Linear.

    It is one of `hyimg.model.layers.Linear.adapters`. `alpha` and `multiplier` are plain numbers, so that
    the forward pass never waits for the device to read them; with a multiplier of 0 the output is the base's,
    bit for bit. A fresh adapter has an up of zeros and does nothing. With a `magnitude` it is a DoRA; a
    `dropout` acts only while it has a key.
    """

    lora_down: nn.Linear
    lora_up: nn.Linear

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        assert rank > 0
        self.rank = rank
        self.alpha = alpha
        self.multiplier = 1.0
        self.magnitude: Magnitude | None = None
        self.dropout: Dropout | None = None
        self._make_weights(in_features, out_features)

    def _make_weights(self, in_features: int, out_features: int) -> None:
        self.lora_down = weight_only(in_features, self.rank)
        self.lora_up = weight_only(self.rank, out_features)

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    def forward(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        """Adds the update for the input x (P, I) to the base layer's output y (P, O), in place where it can."""
        dropout = self.dropout if self.dropout is not None and self.dropout.is_on else None
        if self.multiplier == 0 or (dropout is not None and dropout.drops_module()):
            return y_PO
        if self.magnitude is not None:
            update_PO = self.product(x_PI, dropout)
            adapted_PO: Tensor = self.magnitude(
                y_PO, update_PO, *self.matrices(), scale=self.scale, multiplier=self.multiplier
            )
            return adapted_PO
        return self.add_update(x_PI, y_PO, dropout)

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """multiplier * scale * up(down(x)) into y, in place."""
        hidden_PR = F.linear(x_PI, self.lora_down.weight.to(x_PI.dtype))
        if dropout is not None:
            hidden_PR = dropout(hidden_PR)
        up_OR = (self.lora_up.weight * (self.multiplier * self.scale)).to(x_PI.dtype)
        return y_PO.addmm_(hidden_PR, up_OR.t())

    def product(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        """up(down(x)), not yet scaled, in the dtype of x; dropout acts in between."""
        hidden = F.linear(x, self.lora_down.weight.to(x.dtype))
        if dropout is not None:
            hidden = dropout(hidden)
        return F.linear(hidden, self.lora_up.weight.to(x.dtype))

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """Kaiming-uniform down, that is within +-1/sqrt(I), and zero up, as the reference tool.

        Drawn from a generator keyed by `key`, say (seed, module name): the same whatever else is drawn.
        """
        draw_down(self.lora_down.weight, *key, "lora_down")
        nn.init.zeros_(self.lora_up.weight)

    # The matrices as one pair, whatever they are made of: what a file holds and what a merge adds

    @property
    def file_alpha(self) -> float:
        """alpha beside `matrices()`, whose rank may be another than the adapter's."""
        return self.alpha

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(down, up) as they are trained, detached: `file_alpha` / len(down) * up @ down is the update."""
        return self.lora_down.weight.detach(), self.lora_up.weight.detach()

    @torch.no_grad()
    def load_matrices(self, down: Tensor, up: Tensor, alpha: float | None) -> None:
        """Takes over the values of `matrices()` and of `file_alpha`, where there is one."""
        self.lora_down.weight.copy_(down)
        self.lora_up.weight.copy_(up)
        self.alpha = self.alpha if alpha is None else alpha

    def misfit(self, down: Tensor, up: Tensor) -> str | None:
        """Why matrices of the right shapes cannot be loaded, as the end of a sentence; None where they can."""
        return None

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Makes the update `factor` times what it is, by the root of it in down and in up."""
        for half in (self.lora_down, self.lora_up):
            for parameter in half.parameters():
                parameter.mul_(math.sqrt(factor))

    @torch.no_grad()
    def delta(self, device: torch.device | None = None) -> Tensor:
        """alpha/rank * up @ down: without a magnitude, what merging adds to the base weight.

        Float32 (O, I), computed on `device`, by default where the adapter is.
        """
        down_RI, up_OR = (matrix.to(device, torch.float32) for matrix in self.matrices())
        return (up_OR @ down_RI) * self.scale

    @torch.no_grad()
    def merged(self, weight_OI: Tensor, multiplier: float = 1.0) -> Tensor:
        """The weight with which a Linear does what `weight_OI` and the adapter do together; float32."""
        base_OI = weight_OI.float()
        delta_OI = self.delta(base_OI.device)
        if self.magnitude is not None:
            delta_OI = self.magnitude.delta(base_OI, delta_OI)
        return base_OI + multiplier * delta_OI


def weight_only(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free float32 Linear of zeros on the CPU, made without a draw from torch's global generator."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.float32)
    linear.weight = nn.Parameter(torch.zeros(out_features, in_features))
    return linear


def draw_down(weight_RI: Tensor, *key: object) -> None:
    """Fills a down matrix as the reference tool does, by key."""
    nn.init.kaiming_uniform_(weight_RI, a=math.sqrt(5), generator=keyed_generator(*key))
