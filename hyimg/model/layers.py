"""The small layers that the DiT's blocks, text refiner and final layer are made of.

What runs over all tokens is written for few passes over memory and few temporaries. The compiler makes one pass
of the plain form by itself, and is given that.

Shapes: B batch, L tokens, D hidden, F sinusoidal features, K head size, P tokens of all samples, I input and
O output features, U hidden of the feed-forward half
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.model.architecture import DiTArch
from hyimg.model.heads import NORM_EPS, normalize_heads
from hyimg.model.rope import Rope

# (input_PI, output_PO so far) -> output_PO, in that output's dtype: what a LoRA is to the layer that it adapts. The
# output so far is the adapter's to overwrite
Adapter = Callable[[Tensor, Tensor], Tensor]

TIMESTEP_FEATURES = 256
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
        """The base layer's output (P, O) for (P, I), without adapters."""
        return F.linear(input, self.weight, self.bias)

    def multiply(self, input: Tensor) -> Tensor:
        """The product with the weight alone, without bias and adapters."""
        return F.linear(input, self.weight)

    def row_norms(self) -> Tensor:
        """The Euclidean length of each row of the weight, float32 (O,), where the weight is."""
        chunks = torch.split(self.weight.detach(), ROWS_AT_A_TIME)
        return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in chunks])

    def forward(self, input: Tensor) -> Tensor:
        # As a matrix, so that adapters can add to the output in place: to a view, autograd would copy it
        input_PI = input.flatten(0, -2)
        output_PO = self.product(input_PI)
        for adapter in self.adapters:
            output_PO = adapter(input_PI, output_PO)
        return output_PO.view(*input.shape[:-1], -1)

    if TYPE_CHECKING:  # torch's own says Any

        def __call__(self, input: Tensor) -> Tensor: ...


class HeadNorm(nn.Module):
    """RMS norm of each head of queries or keys, and its token's rotary position. See `normalize_heads`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_BLNK: Tensor, rope: Rope | None = None) -> Tensor:
        return normalize_heads(x_BLNK, self.weight, rope)

    if TYPE_CHECKING:

        def __call__(self, x_BLNK: Tensor, rope: Rope | None = None) -> Tensor: ...


class Modulation(nn.Module):
    """`num_chunks` shifts, scales and gates of a block, each (B, 1, D), from the conditioning vector."""

    def __init__(self, hidden: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = Linear(hidden, num_chunks * hidden)

    def forward(self, vec_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec_BD))[:, None].chunk(self.num_chunks, dim=-1)


def normalize(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift by the conditioning (adaLN).

    Scale and shift are the same for all tokens of a sample, and so can be the norm's own weights: one kernel,
    which rounds once.
    """
    width = x_BLD.shape[-1:]
    if torch.compiler.is_compiling():
        return F.layer_norm(x_BLD, width, eps=NORM_EPS) * (1 + scale_B1D) + shift_B1D
    samples = zip(x_BLD, (1 + scale_B1D)[:, 0], shift_B1D[:, 0], strict=True)
    rows = [F.layer_norm(x_LD, width, weight_D, bias_D, NORM_EPS) for x_LD, weight_D, bias_D in samples]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def gated(x_BLD: Tensor, update_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
    """x + update * gate."""
    if torch.compiler.is_compiling():
        return x_BLD + update_BLD * gate_B1D
    out_BLD: Tensor = _Gated.apply(x_BLD, update_BLD, gate_B1D)  # type: ignore[no-untyped-call]
    return out_BLD


class _Gated(torch.autograd.Function):
    """One pass forward. torch's own `addcmul` makes a full-size product more in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate)
        return torch.addcmul(x, update, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        update, gate = ctx.saved_tensors
        needs_x, needs_update, needs_gate = ctx.needs_input_grad
        return (
            grad if needs_x else None,
            grad * gate if needs_update else None,
            (grad * update).sum(dim=1, keepdim=True) if needs_gate else None,
        )


def joined(attn_BLD: Tensor, mlp_BLU: Tensor) -> Tensor:
    """A single block's attention beside its activated feed-forward half (tanh GELU): (B, L, D+U)."""
    if torch.compiler.is_compiling():
        return torch.cat([attn_BLD, F.gelu(mlp_BLU, approximate="tanh")], dim=-1)
    out: Tensor = _Joined.apply(attn_BLD, mlp_BLU)  # type: ignore[no-untyped-call]
    return out


class _Joined(torch.autograd.Function):
    """Writes the activation where it belongs, instead of copying it there."""

    @staticmethod
    def forward(ctx: Any, attn: Tensor, mlp: Tensor) -> Tensor:
        ctx.save_for_backward(mlp)
        out = attn.new_empty((*attn.shape[:-1], attn.shape[-1] + mlp.shape[-1]))
        attn_part, mlp_part = torch.split(out, [attn.shape[-1], mlp.shape[-1]], dim=-1)
        attn_part.copy_(attn)
        torch.ops.aten.gelu.out(mlp, approximate="tanh", out=mlp_part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mlp,) = ctx.saved_tensors
        attn_grad, mlp_grad = torch.split(grad, [grad.shape[-1] - mlp.shape[-1], mlp.shape[-1]], dim=-1)
        return attn_grad, torch.ops.aten.gelu_backward(mlp_grad, mlp, approximate="tanh")


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
        # Not a view: what is offloaded comes back as a tensor of its own, and compiled blocks tell the two apart
        return tokens_BDHW.flatten(2).transpose(1, 2).contiguous()


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
