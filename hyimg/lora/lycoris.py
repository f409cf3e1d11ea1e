"""LoHa and LoKr of a file as adapters beside a Linear, for rendering and merging; they are not trained.

    LoHa   alpha/rank * (w1_a @ w1_b) * (w2_a @ w2_b)     made a few rows at a time, never whole
    LoKr   alpha/rank * kron(w1, w2)                       multiplied factor by factor, never made

The formulas, the names of the tensors and the rules for alpha are LyCORIS's (`lycoris/modules/loha.py`,
`lokr.py`); a LoKr of two whole factors has the scale 1 whatever its alpha.

Shapes: P tokens, I input features, O output features
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.lora.base import Adapter
from hyimg.lora.dropout import Dropout
from hyimg.lora.formats import LOHA_ROLES, LOKR_ROLES, lora_name
from hyimg.lora.plan import ModulePlan
from hyimg.model.keys import ModuleInfo

ROWS_AT_A_TIME = 2048
"""How many rows of a LoHa's product are made together."""


class LyCORIS(Adapter):
    """What LoHa and LoKr share: frozen float32 tensors under LyCORIS's names."""

    shape: tuple[int, int]
    """(O, I) of the update."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` by role, complete and of shapes that fit each other."""
        rank, self.shape = self._rank(tensors), self._shape(tensors)
        alpha = float(tensors["alpha"]) if rank is not None and "alpha" in tensors else float(rank or 1)
        super().__init__(self.shape[1], self.shape[0], rank=rank or 1, alpha=alpha)
        for role, tensor in tensors.items():
            if role != "alpha":
                self.register_parameter(role, nn.Parameter(tensor.float(), requires_grad=False))

    @staticmethod
    @abstractmethod
    def _rank(tensors: Mapping[str, Tensor]) -> int | None:
        """What alpha is divided by; None where nothing is scaled."""

    @staticmethod
    @abstractmethod
    def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(O, I) of the update."""

    @abstractmethod
    def rows(self, rows: slice, device: torch.device | str | None = None) -> Tensor:
        """Some rows of the update, scaled, float32."""

    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of the update."""

    @torch.no_grad()
    def delta(self, device: torch.device | None = None) -> Tensor:
        return self.rows(slice(None), device)

    def _tensor(self, role: str, device: torch.device | str | None) -> Tensor:
        return self.get_parameter(role).to(device)


class LoHa(LyCORIS):
    """The elementwise product of two low-rank matrices; its rank is up to the square of `rank`."""

    @staticmethod
    def _rank(tensors: Mapping[str, Tensor]) -> int | None:
        return len(tensors["hada_w1_b"])

    @staticmethod
    def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        return len(tensors["hada_w1_a"]), tensors["hada_w1_b"].shape[1]

    def rows(self, rows: slice, device: torch.device | str | None = None) -> Tensor:
        a1, b1, a2, b2 = (self._tensor(f"hada_{part}", device) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return (a1[rows] @ b1).mul_(a2[rows] @ b2).mul_(self.scale)

    def norm(self) -> float:
        squares = [self.rows(rows).double().square().sum() for rows in self._chunks()]
        return float(torch.stack(squares).sum().sqrt())

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        for rows in self._chunks():
            delta_OI = (self.rows(rows) * self.multiplier).to(x_PI.dtype)
            y_PO[:, rows].addmm_(x_PI, delta_OI.t())
        return y_PO

    def _chunks(self) -> Sequence[slice]:
        return [slice(start, start + ROWS_AT_A_TIME) for start in range(0, self.shape[0], ROWS_AT_A_TIME)]


class LoKr(LyCORIS):
    """A Kronecker product: (p x q) blocks, each `w2` times a number of `w1`."""

    @staticmethod
    def _rank(tensors: Mapping[str, Tensor]) -> int | None:
        return next((len(tensors[r]) for r in ("lokr_w2_b", "lokr_w1_b") if r in tensors), None)

    @staticmethod
    def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        rows, columns = 1, 1
        for role in ("lokr_w1", "lokr_w2"):
            left, right = (tensors.get(role, tensors.get(f"{role}{end}")) for end in ("_a", "_b"))
            assert left is not None
            assert right is not None
            rows, columns = rows * len(left), columns * right.shape[1]
        return rows, columns

    def rows(self, rows: slice, device: torch.device | str | None = None) -> Tensor:
        w1, w2 = (self._factor(name, device) for name in ("w1", "w2"))
        if rows == slice(None):
            return torch.kron(w1, w2).mul_(self.scale)
        numbers = torch.arange(*rows.indices(self.shape[0]), device=w1.device)
        first, second = w1[numbers // len(w2)], w2[numbers % len(w2)]
        return torch.einsum("oq,oi->oqi", first, second).flatten(1).mul_(self.scale)

    def norm(self) -> float:
        w1, w2 = (self._factor(name).double().norm() for name in ("w1", "w2"))
        return abs(self.scale) * float(w1 * w2)

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        w1_pq = (self._factor("w1") * (self.multiplier * self.scale)).to(x_PI.dtype)
        hidden = x_PI.reshape(len(x_PI), w1_pq.shape[1], -1)
        for role in ("lokr_w2",) if hasattr(self, "lokr_w2") else ("lokr_w2_b", "lokr_w2_a"):
            hidden = F.linear(hidden, self.get_parameter(role).to(x_PI.dtype))
        return y_PO.add_(torch.matmul(w1_pq, hidden).flatten(1))

    def _factor(self, name: str, device: torch.device | str | None = None) -> Tensor:
        role = f"lokr_{name}"
        if hasattr(self, role):
            return self._tensor(role, device)
        return self._tensor(f"{role}_a", device) @ self._tensor(f"{role}_b", device)


def lycoris_adapters(
    modules: Sequence[ModuleInfo], state: Mapping[str, Tensor]
) -> list[tuple[ModulePlan, LyCORIS]]:
    """The LoHas and LoKrs in a state of the reference tool's names, each with the plan that describes it.

    `state` is what `read_lora` gives, whose shapes fit each other.
    """
    found: list[tuple[ModulePlan, LyCORIS]] = []
    for module in modules:
        prefix = f"{lora_name(module.name)}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        kind = LoHa if own.keys() & LOHA_ROLES else LoKr if own.keys() & LOKR_ROLES else None
        if kind is not None:
            adapter = kind(own)
            plan = ModulePlan(
                module.name, module.in_features, module.out_features, adapter.rank, adapter.alpha
            )
            found.append((plan, adapter))
    return found
