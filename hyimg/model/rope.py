"""Rotary positions of image tokens in two axes: rows rotate the first half of a head, columns the second.

Text tokens have no positions. Source: the official `posemb_layers.py` (theta 256, neighbouring values of a head
form a pair); the golden file `dit_base` holds the angles.
Shapes: B batch, L image tokens (row by row), M image, then text tokens, T the first of them, N heads, K head size,
P = K/2 pairs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from hyimg.model.kernels import rotate

THETA = 256.0


class Rope(NamedTuple):
    """The rotation of each token's pairs: float32 (M, P, 2), the cosine and sine of its angles.

    The first L rows are the image's. Text tokens follow with angle 0.
    """

    freqs_MP2: Tensor

    def freqs_cis(self, num_tokens: int) -> Tensor:
        """The rotations of the first tokens, for all heads: complex64 (T, 1, P)."""
        return torch.view_as_complex(self.freqs_MP2[:num_tokens])[:, None]


def image_rope(height: int, width: int, head_dim: int, device: torch.device, num_text: int = 0) -> Rope:
    """The rotations of a latent of `height` x `width` pixels, counted from 0, and of `num_text` text tokens."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    frequencies = 1.0 / THETA**exponents
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (height, width)]
    positions = torch.meshgrid(*axes, indexing="ij")
    angles_LP = torch.cat([torch.outer(p.flatten(), frequencies) for p in positions], dim=1)
    angles_MP = torch.cat([angles_LP, angles_LP.new_zeros(num_text, head_dim // 2)])
    return Rope(torch.stack([angles_MP.cos(), angles_MP.sin()], dim=-1))


def apply_rope(x_BTNK: Tensor, rope: Rope) -> Tensor:
    """Rotates the heads of the first T tokens, in float32; returns the input's dtype."""
    if torch.compiler.is_compiling() or x_BTNK.device.type not in ("cpu", "cuda"):
        return apply_rope_real(x_BTNK, rope)
    return rotate(x_BTNK, rope.freqs_cis(x_BTNK.shape[1]))


def apply_rope_real(x_BTNK: Tensor, rope: Rope) -> Tensor:
    """`apply_rope` without complex numbers, which the compiler and some devices handle badly."""
    cos, sin = rope.freqs_MP2[: x_BTNK.shape[1], None].unbind(-1)
    first, second = rearrange(x_BTNK.float(), "b t n (p two) -> two b t n p", two=2)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.flatten(-2).to(x_BTNK.dtype)
