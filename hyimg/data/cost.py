"""What a bucket costs the DiT: its image tokens, and the compute of one image against one of 2048x2048."""

from __future__ import annotations

from hyimg.data.buckets import Size
from hyimg.model.architecture import DIT_2_1, SPATIAL_FACTOR

REFERENCE_SIZE: Size = (2048, 2048)
"""The size whose relative cost is 1."""


def image_tokens(size: Size) -> int:
    """The tokens of an image of (width, height): one for each latent pixel."""
    return (size[0] // SPATIAL_FACTOR) * (size[1] // SPATIAL_FACTOR)


def relative_cost(size: Size) -> float:
    """The operations of a training step on one image of a size, over those on one of 2048x2048.

    Counted are the image tokens in the blocks of HunyuanImage-2.1, which all cost the same: for L tokens of
    width h and an MLP of width m, the linear layers take 2 L (4 h^2 + 2 h m) operations and attention
    4 L^2 h; together proportional to L (2 h + m + L). Backward and recomputation multiply both alike. Text
    tokens (about 100, against 4096) and what is done once an image are left out.
    """
    return _work(image_tokens(size)) / _work(image_tokens(REFERENCE_SIZE))


def _work(num_tokens: int) -> int:
    return num_tokens * (2 * DIT_2_1.hidden + DIT_2_1.mlp_hidden + num_tokens)
