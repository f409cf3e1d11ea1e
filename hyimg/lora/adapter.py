"""LoRA (Hu et al. 2021, section 4.1), possibly split by rows or with a magnitude (DoRA).

    y + multiplier * alpha/rank * up(down(x))

Precision. The weights are float32 parameters, so that small optimiser steps are not lost. Both products are
computed in the dtype of the input x: under a bf16 model the weights are cast to bf16 on the way in and the casts'
gradients are float32 again, which is the product that the reference tool gets from bf16 autocast. The scale is
multiplied into `up` before its cast, and the second product is added to y inside its kernel, in float32 and
rounded once, where the reference rounds the update and then the scaled update. In a float32 model all is float32.

Memory. No tensor of the base output's size is created: the update is added to y in place.

Shapes: P tokens, I input features, O output features, R rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.lora.base import Adapter, Dropout, at_least_float32
from hyimg.model.layers import Linear
from hyimg.randomness import keyed_generator

if TYPE_CHECKING:
    from hyimg.lora.rank_plan import ModulePlan


MIN_NORM = 1e-12


class Magnitude(nn.Module):
    """`dora_scale` (O, 1), the norm of each output row of the adapted weight (DoRA, Liu et al., arXiv 2402.09353).

        W' = m * (W + D) / |W + D|,   D = alpha/rank * up @ down,   |.| the norm of each output row

    m is initialised to |W|, so that a fresh adapter does nothing. The norm is a constant in the gradient (section
    4.3). Rows, and not the paper's columns, as in PEFT and in LyCORIS since its version 3. A multiplier interpolates
    between the base (0) and W' (1), as in ComfyUI. The base's norms are taken once, from the Linear that it is bound
    to (`bind`).

    In a file m is `dora_scale`, float32 (O, 1), which is how LyCORIS and ComfyUI distinguish rows from columns (1, I).
    ComfyUI divides a `dora_scale` of rows by |W| instead of |W + D| until its pull request 15458, so that rows come
    out slightly longer or shorter than trained.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.dora_scale = nn.Parameter(torch.zeros(out_features, 1))
        self.is_fresh = True
        self._linear: tuple[Linear, ...] = ()  # a tuple, so that it does not become a submodule
        self._base_norm_O = torch.empty(0)

    @torch.no_grad()
    def bind(self, linear: Linear) -> None:
        """Takes the norms of a Linear's rows, and starts at them unless values were loaded."""
        self._linear = (linear,)
        # not a buffer: casting the network to bf16 must not round it
        self._base_norm_O = linear.row_norms().to(self.dora_scale.device)
        if self.is_fresh:
            self.load(self._base_norm_O[:, None])

    def release(self) -> None:
        """Forgets the Linear."""
        self._linear = ()

    @torch.no_grad()
    def load(self, dora_scale_O1: Tensor) -> None:
        self.dora_scale.copy_(dora_scale_O1)
        self.is_fresh = False

    def forward(
        self, y: Tensor, update: Tensor, down_RI: Tensor, up_OR: Tensor, *, scale: float, multiplier: float
    ) -> Tensor:
        """The output of W' (interpolated) from that of W, `y` (..., O), and from up(down(x)), `update`.

        `scale` is alpha/rank of `down_RI` and `up_OR`. In a bf16 model everything except the norms is bf16: what
        is added to `y` is small, and so is its rounding error.
        """
        (linear,) = self._linear
        ratio_O = self.dora_scale[:, 0] / self._adapted_norm(linear, down_RI, up_OR, scale)
        unbiased = y if linear.bias is None else y - linear.bias
        change = torch.mul(unbiased, (ratio_O - 1).to(y.dtype))
        change = change + update * (ratio_O * scale).to(y.dtype)
        return torch.add(y, change, alpha=multiplier)

    @torch.no_grad()
    def _adapted_norm(self, linear: Linear, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
        """|W + D| of each row, float32 (O), without a matrix of the weight's size:

        |w + d|^2 = |w|^2 + 2 w.d + |d|^2 with d = scale * up @ down, so w.d takes a product of W with R rows.
        """
        dtype = linear.bias.dtype  # the dtype of the model's products; the weight's may be fp8
        base_down_OR = linear.matmul(down_RI.to(dtype)).T.float()
        up_OR = up_OR.float()
        dot_O = (base_down_OR * up_OR).sum(1)
        gram_RR = down_RI.float() @ down_RI.float().T
        square_O = ((up_OR @ gram_RR) * up_OR).sum(1)
        base_norm_O = self._base_norm_O.to(up_OR.device)
        adapted_O = base_norm_O.square() + 2 * scale * dot_O + scale * scale * square_O
        return torch.clamp(adapted_O, min=MIN_NORM**2).sqrt()

    @torch.no_grad()
    def delta(self, base_OI: Tensor, delta_OI: Tensor, now_OI: Tensor) -> Tensor:
        """What to add to the current weight, float32 (O, I), given W and D: W' - W if the weight still is W.

        If others were merged into W before, rows are scaled as `forward` scales their outputs: m / |W + D|.
        """
        adapted_OI = base_OI + delta_OI
        norm_O1: Tensor = torch.linalg.vector_norm(adapted_OI, dim=1, keepdim=True)
        norm_O1 = torch.clamp(norm_O1, min=MIN_NORM)
        ratio_O1 = self.dora_scale.to(base_OI.device).float() / norm_O1
        return (now_OI + delta_OI) * ratio_O1 - now_OI


class LoRA(Adapter):
    """`lora_down.weight` (R, I) and `lora_up.weight` (O, R); with a `magnitude` it is a DoRA.

    A fresh adapter has an up of zeros and does nothing.
    """

    supports: ClassVar[frozenset[str]] = frozenset(Adapter.OPTIONAL_FEATURES)

    lora_down: nn.Linear
    lora_up: nn.Linear

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        self.magnitude: Magnitude | None = None
        self._make_weights(in_features, out_features)

    @classmethod
    def create(cls, plan: ModulePlan, **arguments: Any) -> LoRA:
        """The adapter for a module's plan: plain, split by rows, or a DoRA."""
        lora: LoRA
        if plan.parts:
            lora = SplitLoRA(plan.in_features, plan.parts, rank=plan.rank, alpha=plan.alpha)
        else:
            lora = LoRA(plan.in_features, plan.out_features, rank=plan.rank, alpha=plan.alpha)
        if plan.dora:
            lora.magnitude = Magnitude(plan.out_features)
        return lora

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> LoRA:
        """A frozen adapter of a file's tensors, a magnitude included; without alpha it is the rank."""
        rank, columns = tensors["lora_down.weight"].shape
        adapter = LoRA(columns, len(tensors["lora_up.weight"]), rank=rank, alpha=float(rank))
        adapter.to(dtype).requires_grad_(False)
        if "dora_scale" in tensors:
            adapter.magnitude = Magnitude(adapter.out_features).requires_grad_(False)
        adapter.load_tensors(tensors)
        return adapter

    def _make_weights(self, in_features: int, out_features: int) -> None:
        self.lora_down = weight_only(in_features, self.rank)
        self.lora_up = weight_only(self.rank, out_features)

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Adds multiplier * scale * up(down(x)) to y, in place; a DoRA returns a new tensor."""
        if self.magnitude is not None:
            update_PO = self.product(x_PI, dropout)
            adapted_PO: Tensor = self.magnitude(
                y_PO, update_PO, *self.matrices(), scale=self.scale, multiplier=self.multiplier
            )
            return adapted_PO
        return self.add_product(x_PI, y_PO, dropout)

    def add_product(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Adds multiplier * scale * up(down(x)) to y, in place."""
        hidden_PR = F.linear(x_PI, self.lora_down.weight.to(x_PI.dtype))
        if dropout is not None:
            hidden_PR = dropout(hidden_PR)
        up_OR = (self.lora_up.weight * (self.multiplier * self.scale)).to(x_PI.dtype)
        return y_PO.addmm_(hidden_PR, up_OR.t())

    def product(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        """up(down(x)), not yet scaled, (..., O) in the dtype of x; dropout acts in between."""
        hidden = F.linear(x, self.lora_down.weight.to(x.dtype))
        if dropout is not None:
            hidden = dropout(hidden)
        return F.linear(hidden, self.lora_up.weight.to(x.dtype))

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """Kaiming-uniform down, within +-1/sqrt(I), and zero up, as in the reference tool."""
        draw_down(self.lora_down.weight, *key, "lora_down")
        nn.init.zeros_(self.lora_up.weight)

    # The matrices as one pair, which is how a file stores them, split or not

    @property
    def file_alpha(self) -> float:
        """The alpha of `matrices()`, whose rank may differ from the adapter's."""
        return self.alpha

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(down, up) in the parameters' dtype, detached: `file_alpha` / len(down) * up @ down is the update."""
        return self.lora_down.weight.detach(), self.lora_up.weight.detach()

    @torch.no_grad()
    def load_matrices(self, down: Tensor, up: Tensor, alpha: float | None) -> None:
        """Copies the values of `matrices()`, and of `file_alpha` unless that is None."""
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
        """The norm of alpha/rank * up @ down, without the magnitude."""
        down_RI, up_OR = (at_least_float32(matrix) for matrix in self.matrices())
        return abs(self.scale) * product_norm(up_OR, down_RI)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scales down and up by the root of `factor`."""
        for half in (self.lora_down, self.lora_up):
            for parameter in half.parameters():
                parameter.mul_(math.sqrt(factor))

    def delta(self) -> Tensor:
        """alpha/rank * up @ down, float32 (O, I), without a graph: what merging adds if there is no magnitude."""
        return self.delta_rows(slice(None))

    @torch.no_grad()
    def delta_rows(self, rows: slice, device: torch.device | str | None = None) -> Tensor:
        """Some rows of alpha/rank * up @ down, without the magnitude."""
        down_RI, up_OR = self.matrices()
        return (at_least_float32(up_OR[rows], device) @ at_least_float32(down_RI, device)) * self.scale

    @property
    def factor_rank(self) -> int:
        return len(self.matrices()[0])

    def factors(self) -> tuple[Tensor, Tensor]:
        down_RI, up_OR = (at_least_float32(matrix) for matrix in self.matrices())
        return up_OR * self.scale, down_RI

    @torch.no_grad()
    def merged(self, weight_OI: Tensor, multiplier: float = 1.0, *, base_OI: Tensor | None = None) -> Tensor:
        now_OI = weight_OI.float()
        delta_OI = self.delta_rows(slice(None), now_OI.device)
        if self.magnitude is not None:
            base_OI = now_OI if base_OI is None else base_OI.float()
            delta_OI = self.magnitude.delta(base_OI, delta_OI, now_OI)
        return now_OI + multiplier * delta_OI


def product_norm(up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """The Frobenius norm of up @ down, a scalar of their dtype.

    |up @ down|^2 is the sum over R x R of (up^T up) * (down down^T), so that the product is never computed.
    """
    square = ((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum()
    return torch.clamp(square, min=0).sqrt()


def weight_only(in_features: int, out_features: int) -> nn.Linear:
    """A float32 Linear of zeros without a bias, on the CPU, created without drawing from torch's global generator."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.float32)
    linear.weight = nn.Parameter(torch.zeros(out_features, in_features))
    return linear


def draw_down(weight_RI: Tensor, *key: object) -> None:
    """Initialises a down matrix as the reference tool does, from the key's generator."""
    nn.init.kaiming_uniform_(weight_RI, a=math.sqrt(5), generator=keyed_generator(*key))


class SplitLoRA(LoRA):
    """An adapter of one rank and alpha for each row range of a fused weight: q, k, v (and the MLP of `linear1`).

    `lora_down.K.weight` (R, I) and `lora_up.K.weight` (heights[K], R) for each part K. A file stores one pair of
    matrices of the summed rank: the downs stacked, up block-diagonal. alpha is written times the number of parts, so
    that alpha/rank, and with it the update, is what was trained; the reference tool does not scale alpha, so that
    its files act 3 or 4 times too weak.
    """

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

    def mismatch(self, tensors: Mapping[str, Tensor]) -> str | None:
        up = tensors["lora_up.weight"]
        blocks = [self._block(up, number) for number in range(len(self.heights))]
        if torch.count_nonzero(up) != sum(torch.count_nonzero(block) for block in blocks):
            return "is one adapter for all rows, not one for each of q, k and v (`split_qkv`)"
        return None

    def _block(self, up: Tensor, number: int) -> Tensor:
        """A part's rows and columns in the joined up."""
        start = sum(self.heights[:number])
        columns = slice(number * self.rank, (number + 1) * self.rank)
        return up[start : start + self.heights[number], columns]
