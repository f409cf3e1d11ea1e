"""How much of a LoRA would survive being merged into an fp8 base.

A merged weight is quantised again, and an update smaller than the steps of e4m3 is lost in it. With W the base
weight, D the update and q the quantisation, merging changes the weight by C = q(W + D) - q(W) instead of D.

- The share of the update that survives: the squared cosine between C and D, which is the part of C's energy
  that points along D. 1: merged as it is; 0: nothing of it is left, what is there is noise.
- The relative error |C - D| / |D|.

This is why rendering applies a LoRA beside an fp8 base instead of merging it.

Shapes: I input features, O output features
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyimg.lora.updates import AnyUpdate
from hyimg.memory.fp8 import dequantize, quantize

# Values of a weight that are worked on at a time: some temporaries of so many float32
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Survival:
    """The four sums that survival is made of, over as many values as one likes; they add up."""

    along: float = 0.0  # <C, D>
    change: float = 0.0  # |C|^2
    update: float = 0.0  # |D|^2
    error: float = 0.0  # |C - D|^2

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.along + other.along,
            self.change + other.change,
            self.update + other.update,
            self.error + other.error,
        )

    @property
    def share(self) -> float:
        """The squared cosine between change and update, 0..1; 0 where they point apart or nothing changes."""
        energy = self.change * self.update
        return max(0.0, self.along) ** 2 / energy if energy else 0.0

    @property
    def relative_error(self) -> float:
        """|C - D| / |D|; 0 where there is no update."""
        return float((self.error / self.update) ** 0.5) if self.update else 0.0


def total(parts: Iterable[Survival]) -> Survival:
    """All of them together."""
    return sum(parts, Survival())


@torch.no_grad()
def survival(weight_OI: Tensor, update: AnyUpdate) -> Survival:
    """What of an update survives being merged into this base weight, and quantised; on the weight's device.

    Merged as `hyimg.lora.merge` does: the sum in float32, rounded to the weight's dtype.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=weight_OI.device)
    step = max(1, _CHUNK_VALUES // weight_OI.shape[1])
    for start in range(0, len(weight_OI), step):
        rows = slice(start, start + step)
        base_OI, update_OI = weight_OI[rows], update.rows(rows, weight_OI.device)
        merged_OI = (base_OI.float() + update_OI).to(base_OI.dtype)
        change_OI = _through_fp8(merged_OI).sub_(_through_fp8(base_OI))
        sums += torch.stack(
            [
                (change_OI * update_OI).sum(),
                change_OI.square().sum(),
                update_OI.square().sum(),
                change_OI.sub_(update_OI).square_().sum(),
            ]
        )
    return Survival(*sums.tolist())


def _through_fp8(weight_OI: Tensor) -> Tensor:
    return dequantize(*quantize(weight_OI), torch.float32)
