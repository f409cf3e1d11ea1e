"""The plain composition of the DiT's blocks: each formula written down as it is read, with no thought of temporaries.

It takes the place of `DiT.run_block`, and so computes with the same model's weights and adapters. What the
training step gains over it is what the model's own way of computing is worth:

- norm, then scale, then shift; gate, then addition: a tensor each
- RMS norms and rotary positions in float32, pair by pair
- an adapter's update at full width, scaled, then added
- a weight in fp8 multiplied by its scales in float32, cast, and kept by autograd until backward
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyimg.lora.adapter import LoRA
from hyimg.memory.fp8 import ScaledLinear
from hyimg.model.attention import Attend
from hyimg.model.blocks import DoubleBlock, SingleBlock
from hyimg.model.layers import MLP, HeadNorm, Linear, Modulation
from hyimg.model.rope import Rope

NORM_EPS = 1e-6


@dataclass(frozen=True)
class PlainBlocks:
    """How to run the blocks of a DiT plainly: for its `run_block`. The first `num_image` tokens are the image's."""

    num_image: int
    checkpointing: bool = False

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, block, *args, use_reentrant=False)
        return self._run(block, *args)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if isinstance(block, DoubleBlock):
            return double_block(block, *args)
        assert isinstance(block, SingleBlock)
        return single_block(block, *args, num_image=self.num_image)


def double_block(
    block: DoubleBlock, img_BLD: Tensor, txt_BTD: Tensor, vec_BD: Tensor, rope: Rope, attend: Attend
) -> tuple[Tensor, Tensor]:
    img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = modulation(block.img_mod, vec_BD)
    txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = modulation(block.txt_mod, vec_BD)

    img_q, img_k, img_v = heads(
        linear(block.img_attn_qkv, norm(img_BLD, img_shift1, img_scale1)), block.heads
    )
    txt_q, txt_k, txt_v = heads(
        linear(block.txt_attn_qkv, norm(txt_BTD, txt_shift1, txt_scale1)), block.heads
    )
    img_q = rotated(rms_norm(block.img_attn_q_norm, img_q), rope)
    img_k = rotated(rms_norm(block.img_attn_k_norm, img_k), rope)
    txt_q, txt_k = rms_norm(block.txt_attn_q_norm, txt_q), rms_norm(block.txt_attn_k_norm, txt_k)
    attn_BMD = attend(
        torch.cat([img_q, txt_q], dim=1), torch.cat([img_k, txt_k], dim=1), torch.cat([img_v, txt_v], dim=1)
    )
    img_attn, txt_attn = attn_BMD[:, : img_BLD.shape[1]], attn_BMD[:, img_BLD.shape[1] :]

    img_BLD = img_BLD + linear(block.img_attn_proj, img_attn) * img_gate1
    img_BLD = img_BLD + mlp(block.img_mlp, norm(img_BLD, img_shift2, img_scale2)) * img_gate2
    txt_BTD = txt_BTD + linear(block.txt_attn_proj, txt_attn) * txt_gate1
    txt_BTD = txt_BTD + mlp(block.txt_mlp, norm(txt_BTD, txt_shift2, txt_scale2)) * txt_gate2
    return img_BLD, txt_BTD


def single_block(
    block: SingleBlock, x_BMD: Tensor, vec_BD: Tensor, rope: Rope, attend: Attend, *, num_image: int
) -> Tensor:
    shift, scale, gate = modulation(block.modulation, vec_BD)
    qkv_BMX, hidden = torch.split(linear(block.linear1, norm(x_BMD, shift, scale)), block.widths, dim=-1)
    q, k, v = heads(qkv_BMX, block.heads)
    q, k = rms_norm(block.q_norm, q), rms_norm(block.k_norm, k)
    q = torch.cat([rotated(q[:, :num_image], rope), q[:, num_image:]], dim=1)
    k = torch.cat([rotated(k[:, :num_image], rope), k[:, num_image:]], dim=1)
    attn_BMD = attend(q, k, v)
    out_BMD = linear(block.linear2, torch.cat([attn_BMD, F.gelu(hidden, approximate="tanh")], dim=-1))
    return x_BMD + out_BMD * gate


def linear(layer: Linear, x: Tensor) -> Tensor:
    weight_OI = layer.weight
    if isinstance(layer, ScaledLinear):
        scale = layer.weight_scale
        grouped = weight_OI.float().view(*scale.shape[:-1], -1) if scale.dim() > 1 else weight_OI.float()
        weight_OI = (grouped * scale).view(weight_OI.shape).to(x.dtype)
    y = F.linear(x, weight_OI, layer.bias)
    for adapter in layer.adapters:
        assert isinstance(adapter, LoRA)
        down, up = adapter.lora_down.weight.to(x.dtype), adapter.lora_up.weight.to(x.dtype)
        update = F.linear(F.linear(x, down), up)
        y = y + update * adapter.multiplier * adapter.scale
    return y


def modulation(layer: Modulation, vec_BD: Tensor) -> tuple[Tensor, ...]:
    return linear(layer.linear, F.silu(vec_BD))[:, None].chunk(layer.num_chunks, dim=-1)


def mlp(layer: MLP, x: Tensor) -> Tensor:
    return linear(layer.fc2, F.gelu(linear(layer.fc1, x), approximate="tanh"))


def norm(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def rms_norm(layer: HeadNorm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
    return wide.to(x.dtype) * layer.weight


def heads(qkv_BLX: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rearrange(qkv_BLX, "b l (three n k) -> three b l n k", three=3, n=num_heads).unbind()
    return q, k, v


def rotated(x_BLNK: Tensor, rope: Rope) -> Tensor:
    """Image tokens, turned."""
    cos, sin = rope.freqs_MP2[: x_BLNK.shape[1], None].unbind(-1)
    first, second = x_BLNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x_BLNK.dtype)
