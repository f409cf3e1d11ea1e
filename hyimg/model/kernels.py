"""Hand-written kernels: each saves at least 5% of a training step in time or in peak memory, as measured below.

Measured with the mid-size DiT of `benchmarks` (hidden 768; 1 double and 2 single blocks), LoRA of rank 16, batch 1, 128
text tokens, on one thread of an AMD EPYC (family 25, model 17) with torch 2.13. Times are interleaved medians of
user CPU time. The compiler fuses the plain forms itself, and gets those.

Shapes: B batch, T tokens, L tokens, D hidden, U feed-forward width, N heads, K head size, P = K/2 pairs; for
`dequantize_e4m3`, G groups of values that share a scale, K values in a group
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Values decoded at a time, so that a chunk stays in a core's cache
CHUNK_VALUES = 1 << 18


class _Bits(NamedTuple):
    """How e4m3's bits become those of a wider float: shifted left by `shift`, and masked with `mask`.

    Read as the wider float, they are 2^-exponent times the e4m3 value, also for e4m3's subnormals.
    """

    integer: torch.dtype
    shift: int
    mask: int
    exponent: int


_BITS = {
    torch.bfloat16: _Bits(torch.int16, 4, 0x87F0 - (1 << 16), 120),
    torch.float16: _Bits(torch.int16, 7, 0xBF80 - (1 << 16), 8),
    torch.float32: _Bits(torch.int32, 20, 0x87F00000 - (1 << 32), 120),
}


# Against `q.to(dtype).mul_(scale)`, torch's own conversion from e4m3, which is not vectorised on a CPU: a step with fp8
# weights at 256 image tokens takes 0.39 s instead of 0.69 in bfloat16, and 0.63 s instead of 0.83 in float32
def dequantize_e4m3(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 values (G, K) times a scale for each row (G, 1), in float32, bfloat16 or float16; CPU only.

    e4m3 has no infinities, and its NaN, which no quantiser writes, becomes 480 here.
    """
    bits = _BITS[dtype]
    q_GK = q_GK.view(torch.int8)
    wide_GK = torch.empty(q_GK.shape, dtype=bits.integer)
    factor_G1 = (scale_G1.float() * 2.0**bits.exponent).to(dtype)
    step = max(1, CHUNK_VALUES // q_GK.shape[1])
    for start in range(0, len(q_GK), step):
        chunk = wide_GK[start : start + step]
        chunk.copy_(q_GK[start : start + step])  # copies the sign into all upper bits
        chunk.bitwise_left_shift_(bits.shift).bitwise_and_(bits.mask)
        chunk.view(dtype).mul_(factor_G1[start : start + step])
    return wide_GK.view(dtype)


# The following four together, against plain operators: with checkpointing at 1024 image tokens a step needs 189 MB
# instead of 232 on top of the model in float32, 88 instead of 101 in bfloat16, and 1 to 3% less time in float32


def norm_heads(x_BTNK: Tensor, weight_K: Tensor, eps: float, freqs_T1P: Tensor | None) -> Tensor:
    """RMS norm of each head, then its rotation by complex64 `freqs_T1P`; float32 inside, rounded once. CPU only.

    torch has no fused RMS norm for the CPU, and would make eight passes over memory.
    """
    out: Tensor = _NormHeads.apply(x_BTNK, weight_K, eps, freqs_T1P)  # type: ignore[no-untyped-call]
    return out


class _NormHeads(torch.autograd.Function):
    """Saves the input, which is a view of the packed projection, and one value for each head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, freqs: Tensor | None) -> Tensor:
        out = _float_copy(x)
        mean_square = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms, freqs)
        out.mul_(inverse_rms).mul_(weight)
        if freqs is not None:
            _rotate_(out, freqs)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """With n = x / rms: dn = weight * (grad rotated back), dx = (dn - n * mean(dn * n)) / rms."""
        x, weight, inverse_rms, freqs = ctx.saved_tensors
        dn = _float_copy(grad)
        if freqs is not None:
            _rotate_(dn, freqs.conj())
        n = _float_copy(x).mul_(inverse_rms)
        weight_grad = (dn * n).sum(dim=(0, 1, 2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dn.mul_(weight)
        mean = (dn * n).sum(dim=-1, keepdim=True).div_(x.shape[-1])
        return dn.addcmul_(n, mean, value=-1).mul_(inverse_rms).to(x.dtype), weight_grad, None, None


def rotate(x_BTNK: Tensor, freqs_T1P: Tensor) -> Tensor:
    """Rotates the pairs of each head by complex64 `freqs_T1P`, in one float32 buffer; returns the input's dtype."""
    out: Tensor = _Rotate.apply(x_BTNK, freqs_T1P)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor) -> Tensor:
        ctx.save_for_backward(freqs)
        return _rotate_(_float_copy(x), freqs).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (freqs,) = ctx.saved_tensors
        return _rotate_(_float_copy(grad), freqs.conj()).to(grad.dtype), None


def _rotate_(x_BTNK: Tensor, freqs_T1P: Tensor) -> Tensor:
    torch.view_as_complex(x_BTNK.view(*x_BTNK.shape[:-1], -1, 2)).mul_(freqs_T1P)
    return x_BTNK


def _float_copy(x: Tensor) -> Tensor:
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def gated_residual(x_BLD: Tensor, update_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
    """x + update * gate in one pass. The backward pass of `torch.addcmul` makes one more full-size product."""
    if torch.compiler.is_compiling():
        return x_BLD + update_BLD * gate_B1D
    out: Tensor = _GatedResidual.apply(x_BLD, update_BLD, gate_B1D)  # type: ignore[no-untyped-call]
    return out


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate)
        return torch.addcmul(x, update, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        update, gate = ctx.saved_tensors
        needs_x, needs_update, needs_gate = ctx.needs_input_grad
        return (
            grad if needs_x else None,
            grad * gate if needs_update else None,
            (grad * update).sum(dim=1, keepdim=True) if needs_gate else None,
        )


def concat_gelu(attn_BLD: Tensor, mlp_BLU: Tensor) -> Tensor:
    """Concatenates attention and tanh-GELU of the feed-forward part, (B, L, D+U), without a copy of the latter."""
    if torch.compiler.is_compiling():
        return torch.cat([attn_BLD, F.gelu(mlp_BLU, approximate="tanh")], dim=-1)
    out: Tensor = _ConcatGelu.apply(attn_BLD, mlp_BLU)  # type: ignore[no-untyped-call]
    return out


class _ConcatGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attn: Tensor, mlp: Tensor) -> Tensor:
        ctx.save_for_backward(mlp)
        out = attn.new_empty((*attn.shape[:-1], attn.shape[-1] + mlp.shape[-1]))
        attn_part, mlp_part = torch.split(out, [attn.shape[-1], mlp.shape[-1]], dim=-1)
        attn_part.copy_(attn)
        torch.ops.aten.gelu.out(mlp, approximate="tanh", out=mlp_part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mlp,) = ctx.saved_tensors
        attn_grad, mlp_grad = torch.split(grad, [grad.shape[-1] - mlp.shape[-1], mlp.shape[-1]], dim=-1)
        return attn_grad, torch.ops.aten.gelu_backward(mlp_grad, mlp, approximate="tanh")
