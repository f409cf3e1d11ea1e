"""What quantising to fp8 costs: the relative error of the weights, by layer kind."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from hyimg.memory.fp8 import dequantize

_BLOCK = re.compile(r"^(double|single)_blocks\.\d+\.")
_CHUNK_VALUES = 1 << 20


def layer_kind(name: str) -> str:
    """What a weight of a block is in every block: `linear1` for `single_blocks.3.linear1.weight`."""
    return _BLOCK.sub("", name).removesuffix(".weight")


class QuantizationErrors:
    """Collects errors weight by weight while a model is quantised; asks nothing back from the device till the end.

    An error is the Frobenius norm of weight minus dequantised weight, over that of the weight.
    """

    def __init__(self) -> None:
        # By kind: sums of squares of the differences and of the weights, float64 (2,) on the device
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, weight_OI: Tensor, q_OI: Tensor, scale: Tensor) -> None:
        """Counts a weight of that original name in; `q_OI` and `scale` as `quantize` gives them."""
        kind = layer_kind(name)
        sums = self._sums.setdefault(kind, weight_OI.new_zeros(2, dtype=torch.float64))
        step = max(1, _CHUNK_VALUES // weight_OI.shape[1])
        for start in range(0, len(weight_OI), step):
            rows = slice(start, start + step)
            wide_OI = weight_OI[rows].float()
            sums[1] += wide_OI.square().sum()
            sums[0] += dequantize(q_OI[rows], scale[rows], torch.float32).sub_(wide_OI).square_().sum()

    def by_kind(self) -> dict[str, float]:
        """Relative error of each kind, 0..1, in the order in which they came."""
        return {kind: _relative(sums) for kind, sums in self._sums.items()}

    def total(self) -> float:
        """Relative error of all weights together."""
        return _relative(torch.stack([sums.cpu() for sums in self._sums.values()]).sum(dim=0))

    def summary(self) -> str:
        """One line: `fp8: relative error 2.4% (linear2 2.6%, ...)`, the largest first."""
        kinds = sorted(self.by_kind().items(), key=lambda item: -item[1])
        listed = ", ".join(f"{kind} {error:.2%}" for kind, error in kinds)
        return f"fp8: relative error of the weights {self.total():.2%} ({listed})"


def _relative(sums: Tensor) -> float:
    error, norm = sums.sqrt().tolist()
    return error / norm if norm else 0.0
