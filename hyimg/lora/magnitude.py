"""DoRA: the weight's direction and the length of its rows are learned apart (Liu et al., arXiv 2402.09353).

    W' = m * (W + D) / |W + D|,   D = alpha/rank * up @ down,   |.| the norm of each output row

m starts at |W|, so that a fresh adapter does nothing. The norm counts as a constant in the gradient (section
4.3). Rows, and not the paper's columns, as in PEFT and in LyCORIS since its version 3. Between the base (0)
and W' (1) a multiplier interpolates, as ComfyUI does.

In a file m is `dora_scale`, float32 (O, 1), which is how LyCORIS and ComfyUI tell rows from columns, (1, I).
ComfyUI divides a `dora_scale` of rows by |W| where DoRA has |W + D| (its pull request 15458 mends that): up
to then it shows rows a little longer or shorter than they were trained.

Shapes: I input features, O output features, R rank
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyimg.model.layers import Linear

MIN_NORM = 1e-12


class Magnitude(nn.Module):
    """`dora_scale` (O, 1), the length that each output row of the adapted weight has.

    It belongs to the Linear that it is bound to (`bind`): the base's row norms are taken there, once, and a
    fresh magnitude starts at them.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.dora_scale = nn.Parameter(torch.zeros(out_features, 1))
        self.is_fresh = True
        self._linear: tuple[Linear, ...] = ()  # in a tuple, so that it is no submodule
        self._base_norm_O = torch.empty(0)

    @torch.no_grad()
    def bind(self, linear: Linear) -> None:
        """Takes the norms of a Linear's rows, and starts at them unless values were loaded."""
        self._linear = (linear,)
        # no buffer: a network that is cast to bf16 must not round it
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

        `scale` is alpha/rank of `down_RI` and `up_OR`. In a bf16 model all but the norms is bf16: what is
        added to `y` is small, and so is its rounding.
        """
        (linear,) = self._linear
        ratio_O = self.dora_scale[:, 0] / self._adapted_norm(linear, down_RI, up_OR, scale)
        unbiased = y if linear.bias is None else y - linear.bias
        change = torch.mul(unbiased, (ratio_O - 1).to(y.dtype))
        change = change + update * (ratio_O * scale).to(y.dtype)
        return torch.add(y, change, alpha=multiplier)

    @torch.no_grad()
    def _adapted_norm(self, linear: Linear, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
        """|W + D| of each row, float32, without a matrix of the weight's size:

        |w + d|^2 = |w|^2 + 2 w.d + |d|^2 with d = scale * up @ down, so w.d takes a product of W with R rows.
        """
        dtype = linear.bias.dtype  # the dtype of the model's products; the weight's may be fp8
        base_down_OR = linear.multiply(down_RI.to(dtype)).T.float()
        up_OR = up_OR.float()
        dot_O = (base_down_OR * up_OR).sum(1)
        gram_RR = down_RI.float() @ down_RI.float().T
        square_O = ((up_OR @ gram_RR) * up_OR).sum(1)
        base_norm_O = self._base_norm_O.to(up_OR.device)
        adapted_O = base_norm_O.square() + 2 * scale * dot_O + scale * scale * square_O
        return torch.clamp(adapted_O, min=MIN_NORM**2).sqrt()

    @torch.no_grad()
    def delta(self, base_OI: Tensor, delta_OI: Tensor, now_OI: Tensor) -> Tensor:
        """What to add to a weight in float32, from W, D and the weight as it is now: W' - W where that is W.

        Where others were merged into W before, rows are scaled as `forward` scales their outputs: m / |W + D|.
        """
        adapted_OI = base_OI + delta_OI
        norm_O1: Tensor = torch.linalg.vector_norm(adapted_OI, dim=1, keepdim=True)
        norm_O1 = torch.clamp(norm_O1, min=MIN_NORM)
        ratio_O1 = self.dora_scale.to(base_OI.device).float() / norm_O1
        return (now_OI + delta_OI) * ratio_O1 - now_OI
