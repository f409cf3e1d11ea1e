"""Rotary positions of image tokens in two axes: rows turn the first half of a head, columns the second.

Text tokens have no positions. Source: the official `posemb_layers.py` (theta 256, neighbouring values of a
head form a pair); the golden file `dit_base` holds the angles.
Shapes: B batch, L image tokens (row by row), T all tokens, N heads, K head size, P = K/2 pairs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

THETA = 256.0


class Rope(NamedTuple):
    """Cosines and sines of each image token's angles, float32."""

    cos_LP: Tensor
    sin_LP: Tensor


def image_rope(height: int, width: int, head_dim: int, device: torch.device) -> Rope:
    """The angles of a latent of `height` x `width` pixels, positions counted from 0."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    frequencies = 1.0 / THETA**exponents
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (height, width)]
    positions = torch.meshgrid(*axes, indexing="ij")
    angles_LP = torch.cat([torch.outer(p.flatten(), frequencies) for p in positions], dim=1)
    return Rope(angles_LP.cos(), angles_LP.sin())


def rotate_image_tokens(x_BTNK: Tensor, rope: Rope) -> Tensor:
    """Turns the pairs of the first L tokens, in float32; the text tokens behind them stay as they are."""
    num_image = len(rope.cos_LP)
    img, txt = x_BTNK[:, :num_image], x_BTNK[:, num_image:]
    cos, sin = rope.cos_LP[:, None], rope.sin_LP[:, None]
    first, second = rearrange(img.float(), "b l n (p two) -> two b l n p", two=2)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    turned = turned.flatten(-2).to(x_BTNK.dtype)
    return torch.cat([turned, txt], dim=1) if txt.shape[1] else turned
