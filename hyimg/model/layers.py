"""The small layers that the DiT's blocks, text refiner and final layer are made of.

Shapes: B batch, L tokens, D hidden, F sinusoidal features
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.model.architecture import DiTArch

# (input, base output) -> output, in the base output's dtype: what a LoRA is to the layer that it adapts
Adapter = Callable[[Tensor, Tensor], Tensor]

TIMESTEP_FEATURES = 256
NORM_EPS = 1e-6
ROWS_AT_A_TIME = 1024
"""How many rows of a weight are made float32 together."""


class Linear(nn.Linear):
    """A Linear of a double or single block: the one place where a block's weight is multiplied.

    `adapters` are called in turn on the input and the output so far. They are a plain attribute and not
    submodules, so that a LoRA never shows in the base model's parameters or state_dict.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.adapters: tuple[Adapter, ...] = ()

    def product(self, input: Tensor) -> Tensor:
        """The base layer's output, without adapters."""
        return F.linear(input, self.weight, self.bias)

    def multiply(self, input: Tensor) -> Tensor:
        """The product with the weight alone, without bias and adapters."""
        return F.linear(input, self.weight)

    def row_norms(self) -> Tensor:
        """The Euclidean length of each row of the weight, float32 (O,), where the weight is."""
        chunks = torch.split(self.weight.detach(), ROWS_AT_A_TIME)
        return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in chunks])

    def forward(self, input: Tensor) -> Tensor:
        output = self.product(input)
        for adapter in self.adapters:
            output = adapter(input, output)
        return output

    if TYPE_CHECKING:  # torch's own says Any

        def __call__(self, input: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension: float32 inside, back to the input's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, NORM_EPS)


class Modulation(nn.Module):
    """`num_chunks` shifts, scales and gates of a block, each (B, 1, D), from the conditioning vector."""

    def __init__(self, hidden: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = Linear(hidden, num_chunks * hidden)

    def forward(self, vec_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec_BD))[:, None].chunk(self.num_chunks, dim=-1)


def normalize(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift by the conditioning (adaLN)."""
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=NORM_EPS) * (1 + scale_B1D) + shift_B1D


class MLP(nn.Module):
    """The feed-forward half of a double block: GELU in its tanh form."""

    def __init__(self, hidden: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, mlp_hidden)
        self.fc2 = Linear(mlp_hidden, hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD), approximate="tanh"))


def timestep_features(timestep_B: Tensor) -> Tensor:
    """Cosines, then sines of a timestep (0..1000, or guidance * 1000) at 128 frequencies: float32 (B, F).

    Frequencies fall from 1 to 1/10000 geometrically, as in DDPM's position encoding.
    """
    half = TIMESTEP_FEATURES // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep_B.device)
    angles_BF = timestep_B.float()[:, None] * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """A number per image (timestep, second timestep or guidance) as a vector (B, D)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, timestep_B: Tensor, dtype: torch.dtype) -> Tensor:
        embedding_BD: Tensor = self.mlp(timestep_features(timestep_B).to(dtype))
        return embedding_BD


class ByT5Mapper(nn.Module):
    """Glyph tokens (B, S, E) to the DiT's width; exact GELU and torch's default eps, unlike the blocks."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(arch.byt5_dim)
        self.fc1 = nn.Linear(arch.byt5_dim, arch.byt5_hidden)
        self.fc2 = nn.Linear(arch.byt5_hidden, arch.byt5_hidden)
        self.fc3 = nn.Linear(arch.byt5_hidden, arch.hidden)

    def forward(self, byt5_BSE: Tensor) -> Tensor:
        x = F.gelu(self.fc1(self.layernorm(byt5_BSE)))
        tokens_BSD: Tensor = self.fc3(F.gelu(self.fc2(x)))
        return tokens_BSD


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) to image tokens (B, H*W, D); a 1x1 convolution, as the checkpoint stores it."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.proj = nn.Conv2d(arch.latent_channels, arch.hidden, kernel_size=1)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        tokens_BDHW: Tensor = self.proj(latent_BCHW)
        return tokens_BDHW.flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Image tokens (B, L, D) to latent channels (B, L, C)."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.linear = nn.Linear(arch.hidden, arch.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(arch.hidden, 2 * arch.hidden))

    def forward(self, img_BLD: Tensor, vec_BD: Tensor) -> Tensor:
        shift_B1D, scale_B1D = self.adaLN_modulation(vec_BD)[:, None].chunk(2, dim=-1)
        latent_BLC: Tensor = self.linear(normalize(img_BLD, shift_B1D, scale_B1D))
        return latent_BLC
