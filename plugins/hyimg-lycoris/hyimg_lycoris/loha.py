"""LoHa: the element-wise product of two low-rank matrices (Hyeon-Woo et al., arXiv 2108.06098, section 2.2).

Shapes: O output features, I input features, R rank
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyimg.lora.base import Adapter
from hyimg.randomness import keyed_generator

# The deviations with which LyCORIS draws them; w2_a is 0
_DEVIATIONS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}


class LoHa(Adapter):
    """`hada_w1_a` and `hada_w2_a` (O, R), `hada_w1_b` and `hada_w2_b` (R, I)."""

    honours: ClassVar[frozenset[str]] = frozenset({"scale_weight_norms"})

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        self.hada_w1_a = nn.Parameter(torch.zeros(out_features, rank))
        self.hada_w1_b = nn.Parameter(torch.zeros(rank, in_features))
        self.hada_w2_a = nn.Parameter(torch.zeros(out_features, rank))
        self.hada_w2_b = nn.Parameter(torch.zeros(rank, in_features))

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """Normal draws, and zeros in `hada_w2_a`, so that a fresh adapter does nothing."""
        self.hada_w2_a.zero_()
        for name, deviation in _DEVIATIONS.items():
            self.get_parameter(name).normal_(std=deviation, generator=keyed_generator(*key, name))

    def delta(self) -> Tensor:
        """alpha/rank * (w1_a @ w1_b) * (w2_a @ w2_b); the two products are made again in the backward pass."""
        parts = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        product_OI: Tensor = checkpoint(_product, *parts, use_reentrant=False)
        return self.scale * product_OI

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """By the fourth root of the factor in each of the four."""
        for parameter in self.parameters():
            parameter.mul_(factor**0.25)


def _product(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    return (w1_a.float() @ w1_b.float()) * (w2_a.float() @ w2_b.float())
