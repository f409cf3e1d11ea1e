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
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.lora.base import Adapter
from hyimg.lora.dropout import Dropout
from hyimg.lora.magnitude import Magnitude
from hyimg.model.layers import Linear
from hyimg.randomness import keyed_generator

if TYPE_CHECKING:
    from hyimg.lora.plan import ModulePlan


class LoRA(Adapter):
    """Two trainable matrices, `lora_down.weight` (R, I) and `lora_up.weight` (O, R), beside a frozen Linear.

    A fresh adapter has an up of zeros and does nothing. With a `magnitude` it is a DoRA.
    """

    honours: ClassVar[frozenset[str]] = frozenset(Adapter.OPTIONAL)

    lora_down: nn.Linear
    lora_up: nn.Linear

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        self.magnitude: Magnitude | None = None
        self._make_weights(in_features, out_features)

    @classmethod
    def create(cls, plan: ModulePlan, **arguments: Any) -> LoRA:
        """The plain adapter, one for each row range, or a DoRA."""
        from hyimg.lora.split import SplitLoRA  # which is a LoRA itself

        lora: LoRA
        if plan.parts:
            lora = SplitLoRA(plan.in_features, plan.parts, rank=plan.rank, alpha=plan.alpha)
        else:
            lora = LoRA(plan.in_features, plan.out_features, rank=plan.rank, alpha=plan.alpha)
        if plan.dora:
            lora.magnitude = Magnitude(plan.out_features)
        return lora

    def _make_weights(self, in_features: int, out_features: int) -> None:
        self.lora_down = weight_only(in_features, self.rank)
        self.lora_up = weight_only(self.rank, out_features)

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """multiplier * scale * up(down(x)) into y, in place; a DoRA's by its magnitude."""
        if self.magnitude is not None:
            update_PO = self.product(x_PI, dropout)
            adapted_PO: Tensor = self.magnitude(
                y_PO, update_PO, *self.matrices(), scale=self.scale, multiplier=self.multiplier
            )
            return adapted_PO
        return self.add_product(x_PI, y_PO, dropout)

    def add_product(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
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

    def tensors(self) -> dict[str, Tensor]:
        down, up = self.matrices()
        held = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(self.file_alpha)}
        if self.magnitude is not None:
            held["dora_scale"] = self.magnitude.dora_scale.detach()
        return held

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        alpha = float(tensors["alpha"]) if "alpha" in tensors else None
        self.load_matrices(tensors["lora_down.weight"], tensors["lora_up.weight"], alpha)
        if self.magnitude is not None:
            self.magnitude.load(tensors["dora_scale"])

    def roles(self) -> list[tuple[str, list[nn.Parameter]]]:
        held = [("down", self.lora_down), ("up", self.lora_up), ("magnitude", self.magnitude)]
        return [(role, list(part.parameters())) for role, part in held if part is not None]

    def attached(self, linear: Linear) -> None:
        if self.magnitude is not None:
            self.magnitude.bind(linear)

    def detached(self) -> None:
        if self.magnitude is not None:
            self.magnitude.release()

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        """The norm of alpha/rank * up @ down, whatever a magnitude makes of it.

        |up @ down|^2 is the sum over R x R of (up^T up) * (down down^T), so that nothing of the weight's size is made.
        """
        down_RI, up_OR = (matrix.float() for matrix in self.matrices())
        square = ((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum()
        return self.scale * torch.clamp(square, min=0).sqrt()

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
    def merged(self, weight_OI: Tensor, multiplier: float = 1.0, *, base_OI: Tensor | None = None) -> Tensor:
        now_OI = weight_OI.float()
        delta_OI = self.delta(now_OI.device)
        if self.magnitude is not None:
            base_OI = now_OI if base_OI is None else base_OI.float()
            delta_OI = self.magnitude.delta(base_OI, delta_OI, now_OI)
        return now_OI + multiplier * delta_OI


def weight_only(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free float32 Linear of zeros on the CPU, made without a draw from torch's global generator."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.float32)
    linear.weight = nn.Parameter(torch.zeros(out_features, in_features))
    return linear


def draw_down(weight_RI: Tensor, *key: object) -> None:
    """Fills a down matrix as the reference tool does, by key."""
    nn.init.kaiming_uniform_(weight_RI, a=math.sqrt(5), generator=keyed_generator(*key))
