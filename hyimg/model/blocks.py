"""The two kinds of transformer block: double streams (image and text apart) and single stream (joined).

Both are modulated by the conditioning vector and attend over image and text tokens together, image first.
Module and parameter names are the checkpoint's.
Shapes: B batch, L image tokens, T text tokens, M = L+T, D hidden, N heads, K head size, X packed 3*N*K
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hyimg.model.architecture import DiTArch
from hyimg.model.attention import Attend
from hyimg.model.layers import MLP, Linear, Modulation, RMSNorm, normalize
from hyimg.model.rope import Rope, rotate_image_tokens


class DoubleBlock(nn.Module):
    """Image and text tokens with weights of their own and one attention over both."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.heads = arch.heads
        hidden = arch.hidden

        self.img_mod = Modulation(hidden, num_chunks=6)
        self.img_attn_qkv = Linear(hidden, 3 * hidden)
        self.img_attn_q_norm = RMSNorm(arch.head_dim)
        self.img_attn_k_norm = RMSNorm(arch.head_dim)
        self.img_attn_proj = Linear(hidden, hidden)
        self.img_mlp = MLP(hidden, arch.mlp_hidden)

        self.txt_mod = Modulation(hidden, num_chunks=6)
        self.txt_attn_qkv = Linear(hidden, 3 * hidden)
        self.txt_attn_q_norm = RMSNorm(arch.head_dim)
        self.txt_attn_k_norm = RMSNorm(arch.head_dim)
        self.txt_attn_proj = Linear(hidden, hidden)
        self.txt_mlp = MLP(hidden, arch.mlp_hidden)

    def forward(
        self, img_BLD: Tensor, txt_BTD: Tensor, vec_BD: Tensor, rope: Rope, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec_BD)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec_BD)

        img_q, img_k, img_v = split_heads(
            self.img_attn_qkv(normalize(img_BLD, img_shift1, img_scale1)), self.heads
        )
        txt_q, txt_k, txt_v = split_heads(
            self.txt_attn_qkv(normalize(txt_BTD, txt_shift1, txt_scale1)), self.heads
        )
        img_q = rotate_image_tokens(self.img_attn_q_norm(img_q), rope)
        img_k = rotate_image_tokens(self.img_attn_k_norm(img_k), rope)
        q_BMNK = torch.cat([img_q, self.txt_attn_q_norm(txt_q)], dim=1)
        k_BMNK = torch.cat([img_k, self.txt_attn_k_norm(txt_k)], dim=1)
        v_BMNK = torch.cat([img_v, txt_v], dim=1)
        attn_BMD = attend(q_BMNK, k_BMNK, v_BMNK)
        img_attn, txt_attn = attn_BMD[:, : img_BLD.shape[1]], attn_BMD[:, img_BLD.shape[1] :]

        img_BLD = img_BLD + self.img_attn_proj(img_attn) * img_gate1
        img_BLD = img_BLD + self.img_mlp(normalize(img_BLD, img_shift2, img_scale2)) * img_gate2
        txt_BTD = txt_BTD + self.txt_attn_proj(txt_attn) * txt_gate1
        txt_BTD = txt_BTD + self.txt_mlp(normalize(txt_BTD, txt_shift2, txt_scale2)) * txt_gate2
        return img_BLD, txt_BTD


class SingleBlock(nn.Module):
    """Image and text tokens together, attention and feed-forward side by side in two wide Linears."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.heads = arch.heads
        self.widths = [3 * arch.hidden, arch.mlp_hidden]

        self.linear1 = Linear(arch.hidden, sum(self.widths))
        self.linear2 = Linear(arch.hidden + arch.mlp_hidden, arch.hidden)
        self.q_norm = RMSNorm(arch.head_dim)
        self.k_norm = RMSNorm(arch.head_dim)
        self.modulation = Modulation(arch.hidden, num_chunks=3)

    def forward(self, x_BMD: Tensor, vec_BD: Tensor, rope: Rope, attend: Attend) -> Tensor:
        shift, scale, gate = self.modulation(vec_BD)
        qkv_BMX, mlp = torch.split(self.linear1(normalize(x_BMD, shift, scale)), self.widths, dim=-1)
        q_BMNK, k_BMNK, v_BMNK = split_heads(qkv_BMX, self.heads)
        q_BMNK = rotate_image_tokens(self.q_norm(q_BMNK), rope)
        k_BMNK = rotate_image_tokens(self.k_norm(k_BMNK), rope)
        attn_BMD = attend(q_BMNK, k_BMNK, v_BMNK)
        out_BMD = self.linear2(torch.cat([attn_BMD, F.gelu(mlp, approximate="tanh")], dim=-1))
        x_BMD = x_BMD + out_BMD * gate
        return x_BMD


def split_heads(qkv_BLX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed queries, keys and values, each (B, L, N, K)."""
    q, k, v = rearrange(qkv_BLX, "b l (three n k) -> three b l n k", three=3, n=heads).unbind()
    return q, k, v
