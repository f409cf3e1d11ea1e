"""The small layers of the DiT's blocks, text refiner and final layer.

Shapes: B batch, L tokens, D hidden, N heads, K head size, C latent channels, H W latent size, F sinusoidal features,
P tokens of all samples, I input and O output features, S glyph tokens, E glyph width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DiTArch
from hyimg.model.kernels import norm_heads
from hyimg.model.rope import Rope, apply_rope

NORM_EPS = 1e-6


# (input_PI, output_PO so far) -> output_PO in the same dtype: how a LoRA acts on the layer that it adapts. It may
# overwrite the output so far
OutputAdapter = Callable[[Tensor, Tensor], Tensor]

TIMESTEP_FEATURES = 256
ROWS_AT_A_TIME = 1024
"""Rows of a weight that are converted to float32 at a time."""


class Linear(nn.Linear):
    """A Linear of a double or single block, (..., I) to (..., O), with adapters.

    `adapters` are called in turn with the input and the output so far. They are not submodules, so that a LoRA never
    appears in the base model's parameters or state_dict.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.adapters: tuple[OutputAdapter, ...] = ()

    def base_forward(self, input: Tensor) -> Tensor:
        """The output (P, O) for an input (P, I), without adapters."""
        return F.linear(input, self.weight, self.bias)

    def matmul(self, input: Tensor) -> Tensor:
        """The input times the transposed weight, without bias and adapters."""
        return F.linear(input, self.weight)

    def row_norms(self) -> Tensor:
        """The Euclidean norm of each row of the weight: float32 (O,), on the weight's device."""
        chunks = torch.split(self.weight.detach(), ROWS_AT_A_TIME)
        return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in chunks])

    def forward(self, input: Tensor) -> Tensor:
        # As a matrix, so that adapters can add to the output in place: autograd would copy a view
        input_PI = input.flatten(0, -2)
        output_PO = self.base_forward(input_PI)
        for adapter in self.adapters:
            output_PO = adapter(input_PI, output_PO)
        return output_PO.view(*input.shape[:-1], -1)

    if TYPE_CHECKING:  # torch's own says Any

        def __call__(self, input: Tensor) -> Tensor: ...


class HeadNorm(nn.Module):
    """RMS norm of each head of queries or keys (B, L, N, K), then their rotary positions if they have any."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_BLNK: Tensor, rope: Rope | None = None) -> Tensor:
        if x_BLNK.device.type == "cpu" and not torch.compiler.is_compiling():
            freqs_T1P = rope.freqs_cis(x_BLNK.shape[1]) if rope else None
            return norm_heads(x_BLNK, self.weight, NORM_EPS, freqs_T1P)
        x_BLNK = F.rms_norm(x_BLNK, x_BLNK.shape[-1:], self.weight, NORM_EPS)
        return apply_rope(x_BLNK, rope) if rope else x_BLNK

    if TYPE_CHECKING:

        def __call__(self, x_BLNK: Tensor, rope: Rope | None = None) -> Tensor: ...


class Modulation(nn.Module):
    """The conditioning vector (B, D) to `num_chunks` shifts, scales and gates of a block, each (B, 1, D)."""

    def __init__(self, hidden: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = Linear(hidden, num_chunks * hidden)

    def forward(self, vec_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec_BD))[:, None].chunk(self.num_chunks, dim=-1)


def modulated_norm(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """adaLN: layer norm of (B, L, D), then scale and shift by the conditioning, in the input's dtype.

    Scale and shift are the same for all tokens of a sample, so they serve as the norm's weights: one kernel, which
    rounds once, and 6% less memory for the backward pass of a block.
    """
    width = x_BLD.shape[-1:]
    if torch.compiler.is_compiling():
        return F.layer_norm(x_BLD, width, eps=NORM_EPS) * (1 + scale_B1D) + shift_B1D
    samples = zip(x_BLD, (1 + scale_B1D)[:, 0], shift_B1D[:, 0], strict=True)
    rows = [F.layer_norm(x_LD, width, weight_D, bias_D, NORM_EPS) for x_LD, weight_D, bias_D in samples]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


class MLP(nn.Module):
    """The feed-forward part of a double block, (B, L, D) to (B, L, D), with GELU's tanh approximation."""

    def __init__(self, hidden: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, mlp_hidden)
        self.fc2 = Linear(mlp_hidden, hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD), approximate="tanh"))


def timestep_features(timestep_B: Tensor) -> Tensor:
    """Cosines, then sines of a timestep (0..1000, or guidance * 1000) at 128 frequencies: float32 (B, F).

    Frequencies fall geometrically from 1 to 1/10000, as in DDPM's position encoding.
    """
    half = TIMESTEP_FEATURES // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep_B.device)
    angles_BF = timestep_B.float()[:, None] * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """A number per image (timestep, second timestep or guidance), float32 (B,), to a vector (B, D) in `dtype`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, timestep_B: Tensor, dtype: torch.dtype) -> Tensor:
        embedding_BD: Tensor = self.mlp(timestep_features(timestep_B).to(dtype))
        return embedding_BD


class ByT5Mapper(nn.Module):
    """Glyph tokens (B, S, E) to (B, S, D); unlike the blocks, with exact GELU and torch's default eps."""

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
        # Not a view: offloading does not restore views, and compiled blocks are specialised on them
        return tokens_BDHW.flatten(2).transpose(1, 2).contiguous()


class FinalLayer(nn.Module):
    """Image tokens (B, L, D) to latent channels (B, L, C)."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.linear = nn.Linear(arch.hidden, arch.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(arch.hidden, 2 * arch.hidden))

    def forward(self, img_BLD: Tensor, vec_BD: Tensor) -> Tensor:
        shift_B1D, scale_B1D = self.adaLN_modulation(vec_BD)[:, None].chunk(2, dim=-1)
        latent_BLC: Tensor = self.linear(modulated_norm(img_BLD, shift_B1D, scale_B1D))
        return latent_BLC
