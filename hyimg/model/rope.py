"""Rotary positions of image tokens in two axes: rows turn the first half of a head, columns the second.

Text tokens have no positions. Source: the official `posemb_layers.py` (theta 256, neighbouring values of a
head form a pair); the golden file `dit_base` holds the angles.
Shapes: B batch, L image tokens (row by row), M image, then text tokens, N heads, K head size, P = K/2 pairs
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

THETA = 256.0


class Rope(NamedTuple):
    """How the pairs of each token's heads are turned: float32 (M, P, 2), cosine and sine of the angle.

    The first L rows are the image's. Text tokens stand behind them and are not turned: 1 and 0.
    """

    turn_MP2: Tensor

    def first(self, num_tokens: int) -> Tensor:
        """The turns of the first tokens (the image's alone, or all), for all heads: complex64 (T, 1, P)."""
        return torch.view_as_complex(self.turn_MP2[:num_tokens])[:, None]


def image_rope(height: int, width: int, head_dim: int, device: torch.device, num_text: int = 0) -> Rope:
    """The angles of a latent of `height` x `width` pixels, positions counted from 0, and of the text behind."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    frequencies = 1.0 / THETA**exponents
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (height, width)]
    positions = torch.meshgrid(*axes, indexing="ij")
    angles_LP = torch.cat([torch.outer(p.flatten(), frequencies) for p in positions], dim=1)
    angles_MP = torch.cat([angles_LP, angles_LP.new_zeros(num_text, head_dim // 2)])
    return Rope(torch.stack([angles_MP.cos(), angles_MP.sin()], dim=-1))


def rotate(x_BTNK: Tensor, rope: Rope) -> Tensor:
    """Turns the pairs of the first T tokens' heads, in float32; back in the input's dtype."""
    if torch.compiler.is_compiling() or x_BTNK.device.type == "mps":
        return rotate_plainly(x_BTNK, rope)
    turned: Tensor = _Rotated.apply(x_BTNK, rope.first(x_BTNK.shape[1]))  # type: ignore[no-untyped-call]
    return turned


def rotate_plainly(x_BTNK: Tensor, rope: Rope) -> Tensor:
    """The same without complex numbers, which the compiler and young devices handle badly."""
    cos, sin = rope.turn_MP2[: x_BTNK.shape[1], None].unbind(-1)
    first, second = rearrange(x_BTNK.float(), "b t n (p two) -> two b t n p", two=2)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x_BTNK.dtype)


def turn_(x_BTNK: Tensor, turn_T1P: Tensor) -> Tensor:
    """Turns pairs in place: a complex product. Float32, the last dimension contiguous."""
    torch.view_as_complex(x_BTNK.view(*x_BTNK.shape[:-1], -1, 2)).mul_(turn_T1P)
    return x_BTNK


def float_copy(x: Tensor) -> Tensor:
    """A contiguous float32 copy, to be worked on in place."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class _Rotated(torch.autograd.Function):
    """A rotation in one float32 buffer; backward turns the other way and needs nothing but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return turn_(float_copy(x), turn).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (turn,) = ctx.saved_tensors
        return turn_(float_copy(grad), turn.conj()).to(grad.dtype), None
