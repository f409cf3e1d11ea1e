"""Queries and keys of each head: RMS norm and rotary position.

Float32 inside, back to the input's dtype. On CUDA the norm is torch's fused kernel and the rotation follows, as in
the reference, rounded between the two. torch has no such kernel for the CPU and would make eight passes: there
one function does both in one buffer, and rounds once.

Shapes: B batch, T tokens, N heads, K head size
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.model.rope import Rope, float_copy, rotate, turn_

NORM_EPS = 1e-6


def normalize_heads(x_BTNK: Tensor, weight_K: Tensor, rope: Rope | None = None) -> Tensor:
    """x / rms(x) * weight over each head, then turned by `rope` where the tokens have positions."""
    if torch.compiler.is_compiling() or x_BTNK.device.type != "cpu":
        x_BTNK = F.rms_norm(x_BTNK, x_BTNK.shape[-1:], weight_K, NORM_EPS)
        return rotate(x_BTNK, rope) if rope else x_BTNK
    turn = rope.first(x_BTNK.shape[1]) if rope else None
    out: Tensor = _NormalizedHeads.apply(x_BTNK, weight_K, turn)  # type: ignore[no-untyped-call]
    return out


class _NormalizedHeads(torch.autograd.Function):
    """Norm and rotation on a CPU. Keeps the input, which is a view of the packed projection, and an rms a head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turn: Tensor | None) -> Tensor:
        out = float_copy(x)
        mean_square = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(NORM_EPS).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms, turn)
        out.mul_(inverse_rms).mul_(weight)
        if turn is not None:
            turn_(out, turn)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """With n = x / rms: dn = weight * turned-back grad, dx = (dn - n * mean(dn * n)) / rms."""
        x, weight, inverse_rms, turn = ctx.saved_tensors
        dn = float_copy(grad)
        if turn is not None:
            turn_(dn, turn.conj())
        n = float_copy(x).mul_(inverse_rms)
        weight_grad = (dn * n).sum(dim=(0, 1, 2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dn.mul_(weight)
        mean = (dn * n).sum(dim=-1, keepdim=True).div_(x.shape[-1])
        return dn.addcmul_(n, mean, value=-1).mul_(inverse_rms).to(x.dtype), weight_grad, None
