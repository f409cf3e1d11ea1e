"""An adapter for each row range of a fused weight: q, k, v (and the MLP of `linear1`) apart (`split_qkv`).

A file holds it as one pair of matrices of the summed rank: the downs stacked, up in blocks. alpha is written
times the number of parts, so that alpha/rank, and with it the update, is what was trained; the reference
tool leaves alpha as it is, so that its files come back 3 or 4 times too weak.

Shapes: I input features, O output features, R rank of a part, P number of parts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.lora.adapter import LoRA, draw_down, weight_only
from hyimg.lora.dropout import Dropout


class SplitLoRA(LoRA):
    """`lora_down.K.weight` (R, I) and `lora_up.K.weight` (heights[K], R) for each part K, of one rank and alpha."""

    lora_down: nn.ModuleList  # type: ignore[assignment]
    lora_up: nn.ModuleList  # type: ignore[assignment]

    def __init__(self, in_features: int, heights: Sequence[int], *, rank: int, alpha: float) -> None:
        self.heights = tuple(heights)
        super().__init__(in_features, sum(heights), rank=rank, alpha=alpha)

    def _make_weights(self, in_features: int, out_features: int) -> None:
        self.lora_down = nn.ModuleList(weight_only(in_features, self.rank) for _ in self.heights)
        self.lora_up = nn.ModuleList(weight_only(self.rank, height) for height in self.heights)

    def product(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        parts = []
        for number, (down_RI, up_OR) in enumerate(self._pairs()):
            hidden = F.linear(x, down_RI.to(x.dtype))
            if dropout is not None:
                hidden = dropout(hidden, number)
            parts.append(F.linear(hidden, up_OR.to(x.dtype)))
        return torch.cat(parts, dim=-1)

    def add_product(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        return torch.add(y_PO, self.product(x_PI, dropout), alpha=self.multiplier * self.scale)

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(down, up) of each part."""
        return list(zip(self.lora_down.parameters(), self.lora_up.parameters(), strict=True))

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        for number, (down_RI, up_OR) in enumerate(self._pairs()):
            draw_down(down_RI, *key, "lora_down", number)
            nn.init.zeros_(up_OR)

    @property
    def file_alpha(self) -> float:
        return self.alpha * len(self.heights)

    def matrices(self) -> tuple[Tensor, Tensor]:
        downs, ups = zip(*self._pairs(), strict=True)
        up = ups[0].new_zeros(sum(self.heights), self.rank * len(ups))
        for number, part in enumerate(ups):
            self._block(up, number).copy_(part.detach())
        return torch.cat(downs).detach(), up

    @torch.no_grad()
    def load_matrices(self, down: Tensor, up: Tensor, alpha: float | None) -> None:
        for number, (down_RI, up_OR) in enumerate(self._pairs()):
            down_RI.copy_(down[number * self.rank : (number + 1) * self.rank])
            up_OR.copy_(self._block(up, number))
        self.alpha = self.alpha if alpha is None else alpha / len(self.heights)

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        up = tensors["lora_up.weight"]
        blocks = [self._block(up, number) for number in range(len(self.heights))]
        if torch.count_nonzero(up) != sum(torch.count_nonzero(block) for block in blocks):
            return "is one adapter for all rows, and not one for each of q, k and v (`split_qkv`)"
        return None

    def _block(self, up: Tensor, number: int) -> Tensor:
        """A part's rows and columns in the joined up."""
        start = sum(self.heights[:number])
        columns = slice(number * self.rank, (number + 1) * self.rank)
        return up[start : start + self.heights[number], columns]
