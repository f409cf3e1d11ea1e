"""LoKr: the Kronecker product of a small matrix and a low-rank one (Yeh et al., arXiv 2309.14859, section 3.2).

Shapes: P tokens, O = A*C output features, I = B*D input features, R rank
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.errors import HyimgError
from hyimg.lora.base import Adapter
from hyimg.lora.dropout import Dropout
from hyimg.randomness import keyed_generator


class LoKr(Adapter):
    """`lokr_w1` (A, B); `lokr_w2_a` (C, R) and `lokr_w2_b` (R, D), or `lokr_w2` (C, D) where that is no larger rank.

    O is divided into A*C and I into B*D, A and B the largest divisors that are no larger than `factor` and than
    the root (-1: the root alone). As in LyCORIS, alpha has no effect beside a whole `lokr_w2`.
    """

    honours: ClassVar[frozenset[str]] = frozenset({"scale_weight_norms"})

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, alpha: float, factor: int = -1
    ) -> None:
        if factor == 0 or factor < -1:
            raise HyimgError(
                f"`factor` of `lokr` is {factor}", hint="it is at least 1, or -1 for the largest"
            )
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        self.a, self.b = _divisor(out_features, factor), _divisor(in_features, factor)
        c, d = out_features // self.a, in_features // self.b
        self.lokr_w1 = nn.Parameter(torch.zeros(self.a, self.b))
        self.is_whole = rank >= max(c, d) / 2
        if self.is_whole:
            self.alpha = float(rank)  # a scale of 1, which is how the file's readers take it
            self.lokr_w2 = nn.Parameter(torch.zeros(c, d))
        else:
            self.lokr_w2_a = nn.Parameter(torch.zeros(c, rank))
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, d))

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """Kaiming-uniform draws, and zeros in the last matrix, so that a fresh adapter does nothing."""
        drawn = ["lokr_w1"] if self.is_whole else ["lokr_w1", "lokr_w2_a"]
        for name in drawn:
            generator = keyed_generator(*key, name)
            nn.init.kaiming_uniform_(self.get_parameter(name), a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lokr_w2 if self.is_whole else self.lokr_w2_b)

    def delta(self) -> Tensor:
        """alpha/rank * kron(w1, w2)."""
        return torch.kron(self.lokr_w1.float(), self.scale * self._second())

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """kron(w1, w2) x, without the product: w2 on each of the B pieces of x, then w1 across them."""
        dtype = x_PI.dtype
        hidden_PBC = x_PI.view(len(x_PI), self.b, -1)
        if self.is_whole:
            hidden_PBC = F.linear(hidden_PBC, self.lokr_w2.to(dtype))
        else:
            hidden_PBC = F.linear(F.linear(hidden_PBC, self.lokr_w2_b.to(dtype)), self.lokr_w2_a.to(dtype))
        w1_AB = (self.lokr_w1 * (self.multiplier * self.scale)).to(dtype)
        return y_PO + torch.matmul(w1_AB, hidden_PBC).flatten(1)

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        """The norm of a Kronecker product is the product of the norms."""
        norm: Tensor = torch.linalg.vector_norm(self.lokr_w1.float())
        norm = norm * torch.linalg.vector_norm(self._second())
        return self.scale * norm

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """By the same root of the factor in each matrix."""
        parameters = list(self.parameters())
        for parameter in parameters:
            parameter.mul_(factor ** (1 / len(parameters)))

    def _second(self) -> Tensor:
        return self.lokr_w2.float() if self.is_whole else self.lokr_w2_a.float() @ self.lokr_w2_b.float()


def _divisor(number: int, factor: int) -> int:
    """The largest divisor that is no larger than `factor` and the root."""
    most = math.isqrt(number) if factor == -1 else min(factor, math.isqrt(number))
    return next(d for d in range(most, 0, -1) if number % d == 0)
