"""The token refiner: the text encoder's tokens attend to one another, given the timestep, before the blocks.

Modules and parameters are named as in the checkpoint. Its Linears take no adapters.
Shapes: B batch, T text tokens, W text width, D hidden
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DiTArch
from hyimg.model.attention import Attend, AttentionBackend, bind_lengths
from hyimg.model.blocks import split_heads
from hyimg.model.kernels import gated_residual
from hyimg.model.layers import NORM_EPS, TimestepEmbedder


class TextProjection(nn.Module):
    """The mean of a prompt's tokens, (B, W) to (B, D)."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(arch.text_dim, arch.hidden)
        self.linear_2 = nn.Linear(arch.hidden, arch.hidden)

    def forward(self, text_BW: Tensor) -> Tensor:
        vec_BD: Tensor = self.linear_2(F.silu(self.linear_1(text_BW)))
        return vec_BD


class RefinerMLP(nn.Module):
    """Feed-forward, (B, T, D) to (B, T, D), with SiLU instead of the blocks' GELU."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.fc1 = nn.Linear(arch.hidden, arch.mlp_hidden)
        self.fc2 = nn.Linear(arch.mlp_hidden, arch.hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.fc2(F.silu(self.fc1(x_BTD)))
        return out_BTD


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward on (B, T, D), gated but not shifted by the conditioning."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.heads = arch.heads
        self.norm1 = nn.LayerNorm(arch.hidden, eps=NORM_EPS)
        self.self_attn_qkv = nn.Linear(arch.hidden, 3 * arch.hidden)
        self.self_attn_proj = nn.Linear(arch.hidden, arch.hidden)
        self.norm2 = nn.LayerNorm(arch.hidden, eps=NORM_EPS)
        self.mlp = RefinerMLP(arch)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(arch.hidden, 2 * arch.hidden))

    def forward(self, x_BTD: Tensor, vec_BD: Tensor, attend: Attend) -> Tensor:
        gate1_B1D, gate2_B1D = self.adaLN_modulation(vec_BD)[:, None].chunk(2, dim=-1)
        attn_BTD = attend(*split_heads(self.self_attn_qkv(self.norm1(x_BTD)), self.heads))
        x_BTD = gated_residual(x_BTD, self.self_attn_proj(attn_BTD), gate1_B1D)
        return gated_residual(x_BTD, self.mlp(self.norm2(x_BTD)), gate2_B1D)


class TextRefiner(nn.Module):
    """Text tokens (B, T, W) to the DiT's width (B, T, D)."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(arch.text_dim, arch.hidden)
        self.t_embedder = TimestepEmbedder(arch.hidden)
        self.c_embedder = TextProjection(arch)
        self.individual_token_refiner = nn.ModuleDict(
            {"blocks": nn.ModuleList(RefinerBlock(arch) for _ in range(arch.refiner_depth))}
        )

    def forward(
        self, text_BTW: Tensor, timestep_B: Tensor, lengths: Sequence[int], attention: AttentionBackend
    ) -> Tensor:
        """`lengths` are the numbers of real tokens, which come first in each row; `timestep_B` is sigma * 1000."""
        mean_BW = torch.stack([text_TW[:n].mean(dim=0) for text_TW, n in zip(text_BTW, lengths, strict=True)])
        vec_BD = self.t_embedder(timestep_B, text_BTW.dtype) + self.c_embedder(mean_BW)
        attend = bind_lengths(attention, lengths, text_BTW.shape[1])
        x_BTD: Tensor = self.input_embedder(text_BTW)
        for block in self.individual_token_refiner["blocks"].children():
            x_BTD = block(x_BTD, vec_BD, attend)
        return x_BTD
