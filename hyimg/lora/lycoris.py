"""LoHa and LoKr, trained or read from a file.

    LoHa   alpha/rank * (w1_a @ w1_b) * (w2_a @ w2_b), element by element      Hyeon-Woo et al., arXiv 2108.06098, 2.2
    LoKr   alpha/rank * kron(w1, w2)                                           Yeh et al., arXiv 2309.14859, 3.2

The names of the tensors, their initial values and the rules for alpha are LyCORIS's (`lycoris/modules/loha.py`,
`lokr.py`). A LoKr of two full factors is not scaled, whatever its alpha.

Shapes: P tokens, O = A*C output features, I = B*D input features, R rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyimg.errors import HyimgError
from hyimg.lora.base import Adapter, Dropout, at_least_float32
from hyimg.randomness import keyed_generator

ROWS_AT_A_TIME = 2048
"""How many rows of a LoHa's product are computed together where no gradient is needed."""

# Standard deviations of LyCORIS's initial values; w2_a is 0
_DEVIATIONS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}


class LoHa(Adapter):
    """`hada_w1_a`, `hada_w2_a` (O, R) and `hada_w1_b`, `hada_w2_b` (R, I); its update has a rank of up to R squared."""

    supports: ClassVar[frozenset[str]] = frozenset({"scale_weight_norms"})

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        for part in ("w1", "w2"):
            self.register_parameter(f"hada_{part}_a", nn.Parameter(torch.zeros(out_features, rank)))
            self.register_parameter(f"hada_{part}_b", nn.Parameter(torch.zeros(rank, in_features)))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> LoHa:
        """A frozen adapter of a file's tensors, which must be complete; without alpha it is the rank."""
        rank, columns = tensors["hada_w1_b"].shape
        alpha = float(tensors.get("alpha", rank))
        adapter = cls(columns, len(tensors["hada_w1_a"]), rank=rank, alpha=alpha)
        adapter._set_frozen(tensors, "hada_", dtype)
        return adapter

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """Normal values, and zeros in `hada_w2_a`, so that a fresh adapter does nothing."""
        self.get_parameter("hada_w2_a").zero_()
        for name, deviation in _DEVIATIONS.items():
            self.get_parameter(name).normal_(std=deviation, generator=keyed_generator(*key, name))

    def delta(self) -> Tensor:
        return self.delta_rows(slice(None))

    def delta_rows(self, rows: slice, device: torch.device | str | None = None) -> Tensor:
        a1, b1, a2, b2 = self._factors(device)
        # the backward pass computes the two products again
        product: Tensor = checkpoint(
            _hadamard, a1[rows], b1, a2[rows], b2, use_reentrant=False, preserve_rng_state=False
        )
        return product * self.scale

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return super().add_update(x_PI, y_PO, dropout)
        for rows in self._chunks():
            delta_OI = (self.delta_rows(rows) * self.multiplier).to(x_PI.dtype)
            y_PO[:, rows].addmm_(x_PI, delta_OI.t())
        return y_PO

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(self.delta_rows(rows)) for rows in self._chunks()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scales each of the four matrices by the fourth root of the factor."""
        for parameter in self.parameters():
            parameter.mul_(factor**0.25)

    @property
    def factor_rank(self) -> int:
        return len(self.get_parameter("hada_w1_b")) * len(self.get_parameter("hada_w2_b"))

    def factors(self) -> tuple[Tensor, Tensor]:
        a1, b1, a2, b2 = self._factors(None)
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        return up * self.scale, (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)

    def _factors(self, device: torch.device | str | None) -> list[Tensor]:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return [at_least_float32(self.get_parameter(name), device) for name in names]

    def _chunks(self) -> list[slice]:
        return [slice(start, start + ROWS_AT_A_TIME) for start in range(0, self.out_features, ROWS_AT_A_TIME)]


def _hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    return (a1 @ b1) * (a2 @ b2)


class LoKr(Adapter):
    """`lokr_w1` (A, B) and `lokr_w2_a` (C, R), `lokr_w2_b` (R, D), or `lokr_w2` (C, D) if a low rank saves nothing.

    `full_matrix` trains `lokr_w2` whatever the rank. O is divided into A*C and I into B*D, A and B being the largest
    divisors that exceed neither `factor` nor the root (-1: the root alone). A file may have `lokr_w1_a` and `lokr_w1_b`
    instead of `lokr_w1`.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"scale_weight_norms"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        factor: int = -1,
        full_matrix: bool = False,
    ) -> None:
        if factor == 0 or factor < -1:
            raise HyimgError(
                f"`factor` of `lokr` is {factor}", hint="it is at least 1, or -1 for the largest"
            )
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        a, b = _divisor(out_features, factor), _divisor(in_features, factor)
        c, d = out_features // a, in_features // b
        self.lokr_w1 = nn.Parameter(torch.zeros(a, b))
        if full_matrix or rank >= max(c, d) / 2:
            self.alpha = float(rank)  # a scale of 1, as the file's readers apply
            self.lokr_w2 = nn.Parameter(torch.zeros(c, d))
        else:
            self.lokr_w2_a = nn.Parameter(torch.zeros(c, rank))
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, d))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> LoKr:
        """A frozen adapter of a file's tensors, which must be complete; without alpha it is the rank."""
        ranks = [len(tensors[role]) for role in ("lokr_w2_b", "lokr_w1_b") if role in tensors]
        sizes = []
        for factor in ("lokr_w1", "lokr_w2"):
            left, right = (tensors[factor if factor in tensors else factor + end] for end in ("_a", "_b"))
            sizes.append((len(left), right.shape[1]))
        (a, b), (c, d) = sizes
        rank, alpha = (ranks[0], float(tensors.get("alpha", ranks[0]))) if ranks else (1, 1.0)
        adapter = cls.__new__(cls)
        Adapter.__init__(adapter, b * d, a * c, rank=rank, alpha=alpha)
        adapter._set_frozen(tensors, "lokr_", dtype)
        return adapter

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """Kaiming-uniform values, and zeros in the last matrix, so that a fresh adapter does nothing."""
        *drawn, last = [name for name, _ in self.named_parameters()]
        for name in drawn:
            generator = keyed_generator(*key, name)
            nn.init.kaiming_uniform_(self.get_parameter(name), a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.get_parameter(last))

    def delta(self) -> Tensor:
        return self.delta_rows(slice(None))

    def delta_rows(self, rows: slice, device: torch.device | str | None = None) -> Tensor:
        w1, w2 = self.kronecker_factors(device)
        if rows == slice(None):
            return torch.kron(w1, w2) * self.scale
        numbers = torch.arange(*rows.indices(self.out_features), device=w1.device)
        first, second = w1[numbers // len(w2)], w2[numbers % len(w2)]
        return torch.einsum("oq,oi->oqi", first, second).flatten(1) * self.scale

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """kron(w1, w2) x, factor by factor: w2 on each of the B pieces of x, then w1 across them."""
        w1_AB = (self._factor("lokr_w1", None) * (self.multiplier * self.scale)).to(x_PI.dtype)
        hidden = x_PI.reshape(len(x_PI), w1_AB.shape[1], -1)
        for name in ("lokr_w2",) if hasattr(self, "lokr_w2") else ("lokr_w2_b", "lokr_w2_a"):
            hidden = F.linear(hidden, self.get_parameter(name).to(x_PI.dtype))
        return y_PO.add_(torch.matmul(w1_AB, hidden).flatten(1))

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        """The norm of a Kronecker product is the product of the norms."""
        w1, w2 = (torch.linalg.vector_norm(factor) for factor in self.kronecker_factors())
        norm: Tensor = abs(self.scale) * w1 * w2
        return norm

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scales each matrix by the same root of the factor."""
        parameters = list(self.parameters())
        for parameter in parameters:
            parameter.mul_(factor ** (1 / len(parameters)))

    @property
    def factor_rank(self) -> int:
        """`in_features` with a full `lokr_w2`, whose product has no short form."""
        if hasattr(self, "lokr_w2"):
            return self.in_features
        rank, columns = self.get_parameter("lokr_w2_b").shape
        return self.in_features // columns * rank

    def factors(self) -> tuple[Tensor, Tensor]:
        w1, _ = self.kronecker_factors()
        a2, b2 = (at_least_float32(self.get_parameter(f"lokr_w2_{end}")) for end in ("a", "b"))
        eye = torch.eye(w1.shape[1], dtype=w1.dtype, device=w1.device)
        return torch.kron(w1, a2) * self.scale, torch.kron(eye, b2)

    def kronecker_factors(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """w1 (A, B) and w2 (C, D), not scaled."""
        return self._factor("lokr_w1", device), self._factor("lokr_w2", device)

    def _factor(self, name: str, device: torch.device | str | None) -> Tensor:
        if hasattr(self, name):
            return at_least_float32(self.get_parameter(name), device)
        left, right = (at_least_float32(self.get_parameter(name + end), device) for end in ("_a", "_b"))
        return torch.matmul(left, right)


def _divisor(number: int, factor: int) -> int:
    """The largest divisor that exceeds neither `factor` nor the root."""
    most = math.isqrt(number) if factor == -1 else min(factor, math.isqrt(number))
    return next(d for d in range(most, 0, -1) if number % d == 0)
