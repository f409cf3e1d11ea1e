"""The two kinds of transformer block: double-stream (image and text have their own weights) and single-stream.

Both are modulated by the conditioning vector and attend over image and text tokens together, image first.
`before_attention` and `after_attention` are separate methods because `--torch_compile` compiles them and leaves the
attention between them alone.
Module and parameter names are the checkpoint's.
Shapes: B batch, L image tokens, T text tokens, M = L+T, D hidden, N heads, K head size, X packed 3*N*K,
U hidden of the feed-forward part
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DiTArch
from hyimg.model.attention import Attend
from hyimg.model.kernels import concat_gelu, gated_residual
from hyimg.model.layers import MLP, HeadNorm, Linear, Modulation, modulated_norm
from hyimg.model.rope import Rope


class DoubleBlock(nn.Module):
    """Separate weights for image and text tokens, and one attention over both."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.heads = arch.heads
        hidden = arch.hidden

        self.img_mod = Modulation(hidden, num_chunks=6)
        self.img_attn_qkv = Linear(hidden, 3 * hidden)
        self.img_attn_q_norm = HeadNorm(arch.head_dim)
        self.img_attn_k_norm = HeadNorm(arch.head_dim)
        self.img_attn_proj = Linear(hidden, hidden)
        self.img_mlp = MLP(hidden, arch.mlp_hidden)

        self.txt_mod = Modulation(hidden, num_chunks=6)
        self.txt_attn_qkv = Linear(hidden, 3 * hidden)
        self.txt_attn_q_norm = HeadNorm(arch.head_dim)
        self.txt_attn_k_norm = HeadNorm(arch.head_dim)
        self.txt_attn_proj = Linear(hidden, hidden)
        self.txt_mlp = MLP(hidden, arch.mlp_hidden)

    def forward(
        self, img_BLD: Tensor, txt_BTD: Tensor, vec_BD: Tensor, rope: Rope, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        q_BMNK, k_BMNK, v_BMNK, img_mods, txt_mods = self.before_attention(img_BLD, txt_BTD, vec_BD, rope)
        attn_BMD = attend(q_BMNK, k_BMNK, v_BMNK)
        return self.after_attention(img_BLD, txt_BTD, attn_BMD, img_mods, txt_mods)

    def before_attention(
        self, img_BLD: Tensor, txt_BTD: Tensor, vec_BD: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Queries, keys and values (B, M, N, K), and each stream's remaining four modulations (B, 1, D)."""
        img_shift, img_scale, *img_mods = self.img_mod(vec_BD)
        txt_shift, txt_scale, *txt_mods = self.txt_mod(vec_BD)
        img_qkv_BLX = self.img_attn_qkv(modulated_norm(img_BLD, img_shift, img_scale))
        txt_qkv_BTX = self.txt_attn_qkv(modulated_norm(txt_BTD, txt_shift, txt_scale))
        img_q, img_k, img_v = split_heads(img_qkv_BLX, self.heads)
        txt_q, txt_k, txt_v = split_heads(txt_qkv_BTX, self.heads)
        q_BMNK = torch.cat([self.img_attn_q_norm(img_q, rope), self.txt_attn_q_norm(txt_q)], dim=1)
        k_BMNK = torch.cat([self.img_attn_k_norm(img_k, rope), self.txt_attn_k_norm(txt_k)], dim=1)
        v_BMNK = torch.cat([img_v, txt_v], dim=1)
        return q_BMNK, k_BMNK, v_BMNK, img_mods, txt_mods

    def after_attention(
        self,
        img_BLD: Tensor,
        txt_BTD: Tensor,
        attn_BMD: Tensor,
        img_mods: Sequence[Tensor],
        txt_mods: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Adds attention, then the feed-forward part, to both streams (B, L, D) and (B, T, D)."""
        img_attn, txt_attn = attn_BMD.tensor_split([img_BLD.shape[1]], dim=1)
        img_gate1, img_shift, img_scale, img_gate2 = img_mods
        txt_gate1, txt_shift, txt_scale, txt_gate2 = txt_mods
        img_BLD = gated_residual(img_BLD, self.img_attn_proj(img_attn), img_gate1)
        img_BLD = gated_residual(
            img_BLD, self.img_mlp(modulated_norm(img_BLD, img_shift, img_scale)), img_gate2
        )
        txt_BTD = gated_residual(txt_BTD, self.txt_attn_proj(txt_attn), txt_gate1)
        txt_BTD = gated_residual(
            txt_BTD, self.txt_mlp(modulated_norm(txt_BTD, txt_shift, txt_scale)), txt_gate2
        )
        return img_BLD, txt_BTD


class SingleBlock(nn.Module):
    """Image and text tokens together; attention and feed-forward run in parallel, in two wide Linears."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.heads = arch.heads
        self.widths = [3 * arch.hidden, arch.mlp_hidden]

        self.linear1 = Linear(arch.hidden, sum(self.widths))
        self.linear2 = Linear(arch.hidden + arch.mlp_hidden, arch.hidden)
        self.q_norm = HeadNorm(arch.head_dim)
        self.k_norm = HeadNorm(arch.head_dim)
        self.modulation = Modulation(arch.hidden, num_chunks=3)

    def forward(self, x_BMD: Tensor, vec_BD: Tensor, rope: Rope, attend: Attend) -> Tensor:
        q_BMNK, k_BMNK, v_BMNK, mlp_BMU, gate_B1D = self.before_attention(x_BMD, vec_BD, rope)
        attn_BMD = attend(q_BMNK, k_BMNK, v_BMNK)
        return self.after_attention(x_BMD, attn_BMD, mlp_BMU, gate_B1D)

    def before_attention(
        self, x_BMD: Tensor, vec_BD: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, M, N, K), the feed-forward part (B, M, U), and the gate (B, 1, D)."""
        shift, scale, gate_B1D = self.modulation(vec_BD)
        qkv_BMX, mlp_BMU = torch.split(self.linear1(modulated_norm(x_BMD, shift, scale)), self.widths, dim=-1)
        q_BMNK, k_BMNK, v_BMNK = split_heads(qkv_BMX, self.heads)
        return self.q_norm(q_BMNK, rope), self.k_norm(k_BMNK, rope), v_BMNK, mlp_BMU, gate_B1D

    def after_attention(self, x_BMD: Tensor, attn_BMD: Tensor, mlp_BMU: Tensor, gate_B1D: Tensor) -> Tensor:
        """Adds attention and the activated feed-forward part to the stream (B, M, D)."""
        return gated_residual(x_BMD, self.linear2(concat_gelu(attn_BMD, mlp_BMU)), gate_B1D)


def split_heads(qkv_BLX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits packed queries, keys and values (B, L, X): each (B, L, N, K)."""
    q, k, v = rearrange(qkv_BLX, "b l (three n k) -> three b l n k", three=3, n=heads).unbind()
    return q, k, v
