"""One decoder layer of Qwen2.5 on text, as a function of its weights.

The vision-language model's three-axis rotary position equals the plain one here, since all three positions
of a text token are the same. Agrees with transformers' `Qwen2_5_VLDecoderLayer`.

Shapes: B batch, T text tokens, D hidden, N query heads, M key/value heads, K head size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hyimg.encoders.qwen_checkpoint import QwenArch
from hyimg.memory.fp8 import dequantize


class Fp8Weight(NamedTuple):
    """A matrix in scaled fp8, as `hyimg.memory.fp8.quantize` gives it."""

    q_OI: Tensor
    scale: Tensor


Weight = Tensor | Fp8Weight


class Rotation(NamedTuple):
    """Cosines and sines of the rotary position embedding, in the dtype of the hidden states."""

    cos_TK: Tensor
    sin_TK: Tensor

    def first(self, num_tokens: int) -> Rotation:
        return Rotation(self.cos_TK[:num_tokens], self.sin_TK[:num_tokens])


def rotation(arch: QwenArch, num_tokens: int, *, device: torch.device, dtype: torch.dtype) -> Rotation:
    """The rotations of positions 0 to `num_tokens` - 1 (RoFormer, section 3.2.2, in two halves).

    Angles are float32 whatever the dtype: in bfloat16 the frequencies alone would cost an error of 0.5.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32, device=device) / arch.head_dim
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    half = torch.outer(positions, 1.0 / arch.rope_theta**exponents)
    angles_TK = torch.cat([half, half], dim=-1)
    return Rotation(angles_TK.cos().to(dtype), angles_TK.sin().to(dtype))


def decoder_layer(
    hidden_BTD: Tensor, weights: Mapping[str, Weight], arch: QwenArch, rotary: Rotation
) -> Tensor:
    """The layer's output for rows without padding; `weights` as `QwenArch.layer_shapes` names them."""
    normed_BTD = _rms_norm(hidden_BTD, weights["input_layernorm.weight"], arch.rms_eps)
    hidden_BTD = hidden_BTD + _attention(normed_BTD, weights, arch, rotary)
    normed_BTD = _rms_norm(hidden_BTD, weights["post_attention_layernorm.weight"], arch.rms_eps)
    return hidden_BTD + _mlp(normed_BTD, weights)


def _linear(x: Tensor, weights: Mapping[str, Weight], name: str) -> Tensor:
    """The product by the weight of a module, dequantised for it where it is fp8, and its bias if it has one."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    assert not isinstance(bias, Fp8Weight)
    if isinstance(weight, Fp8Weight):
        return F.linear(x, dequantize(weight.q_OI, weight.scale, x.dtype), bias)
    return F.linear(x, weight, bias)


def _rms_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """Normalized in float32, multiplied by the weight in the input's dtype."""
    assert not isinstance(weight, Fp8Weight)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _attention(x_BTD: Tensor, weights: Mapping[str, Weight], arch: QwenArch, rotary: Rotation) -> Tensor:
    def heads(which: str, num_heads: int) -> Tensor:
        states_BTX = _linear(x_BTD, weights, f"self_attn.{which}_proj")
        return rearrange(states_BTX, "b t (n k) -> b n t k", n=num_heads)

    q_BNTK = _rotate(heads("q", arch.num_heads), rotary)
    k_BMTK = _rotate(heads("k", arch.num_kv_heads), rotary)
    v_BMTK = heads("v", arch.num_kv_heads)
    out_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BMTK, v_BMTK, is_causal=True, enable_gqa=True)
    return _linear(rearrange(out_BNTK, "b n t k -> b t (n k)"), weights, "self_attn.o_proj")


def _rotate(x_BNTK: Tensor, rotary: Rotation) -> Tensor:
    first, second = x_BNTK.chunk(2, dim=-1)
    return x_BNTK * rotary.cos_TK + torch.cat([-second, first], dim=-1) * rotary.sin_TK


def _mlp(x_BTD: Tensor, weights: Mapping[str, Weight]) -> Tensor:
    gate = F.silu(_linear(x_BTD, weights, "mlp.gate_proj"))
    return _linear(gate * _linear(x_BTD, weights, "mlp.up_proj"), weights, "mlp.down_proj")
