"""The updates of a LoRA file, module by module, for looking at them without a model.

Shapes: I input features, O output features, R rank
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from hyimg.lora.contents import LoRAContents
from hyimg.lora.file import read_lora
from hyimg.lora.formats import lora_name
from hyimg.lora.lycoris import LyCORIS, lycoris_adapters
from hyimg.model.keys import ModuleInfo


@dataclass(frozen=True)
class Update:
    """What a LoRA adds to the weight of the module `name` (the model's own): alpha/rank * up @ down."""

    name: str
    down_RI: Tensor
    up_OR: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down_RI)

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are: one NaN makes every image black."""
        halves = (self.down_RI, self.up_OR, torch.tensor(self.alpha))
        return all(bool(half.float().isfinite().all()) for half in halves)  # fp8 does not know whether it is

    def norm(self) -> float:
        """Frobenius norm of the update, from the halves' Gram matrices: the (O, I) product is never made."""
        up_OR, down_RI = self.up_OR.double(), self.down_RI.double()
        square = ((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum()
        return abs(self.alpha) / self.rank * float(square.clamp(min=0).sqrt())

    def rows(self, rows: slice, device: torch.device | str = "cpu") -> Tensor:
        """Some rows of the update in float32."""
        up, down_RI = (half.to(device, torch.float32) for half in (self.up_OR[rows], self.down_RI))
        return (up @ down_RI) * (self.alpha / self.rank)


@dataclass(frozen=True)
class LyCORISUpdate:
    """What a LoHa or LoKr adds to the weight of the module `name`."""

    name: str
    adapter: LyCORIS

    @property
    def rank(self) -> int:
        """That of its parts; 1 for a LoKr of whole factors."""
        return self.adapter.rank

    @property
    def alpha(self) -> float:
        return self.adapter.alpha

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.alpha) and all(bool(p.isfinite().all()) for p in self.adapter.parameters())

    def norm(self) -> float:
        """Frobenius norm of the update."""
        return self.adapter.norm()

    def rows(self, rows: slice, device: torch.device | str = "cpu") -> Tensor:
        """Some rows of the update in float32."""
        return self.adapter.rows(rows, device)


AnyUpdate = Update | LyCORISUpdate


def read_updates(file: str | os.PathLike[str] | LoRAContents) -> list[AnyUpdate]:
    """The updates of a LoRA file in any format, in the order of its modules. Raises as `read_lora`."""
    contents = file if isinstance(file, LoRAContents) else LoRAContents.open(file)
    state = read_lora(contents, lycoris=True)
    modules = [
        ModuleInfo(m.name, contents.width(m.target.in_width), contents.width(m.target.out_width))
        for m in contents.modules
    ]
    others = {plan.name: adapter for plan, adapter in lycoris_adapters(modules, state)}
    updates: list[AnyUpdate] = []
    for module in contents.modules:
        if module.name in others:
            updates.append(LyCORISUpdate(module.name, others[module.name]))
            continue
        name = lora_name(module.name)
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        alpha = float(state[f"{name}.alpha"]) if f"{name}.alpha" in state else float(len(down))
        updates.append(Update(module.name, down, up, alpha))
    return updates
