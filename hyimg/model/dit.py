"""The diffusion transformer of HunyuanImage-2.1: from a noisy latent, a time and a prompt to a velocity.

- image and text tokens in 20 double, then 40 single blocks, image first
- two text encoders: Qwen's tokens pass a refiner, byT5's glyph tokens a small MLP and stand before them
- the distilled model adds a guidance value and a second timestep to the conditioning vector
- forward runs in the weights' dtype; norms, rotary angles and timestep features are float32 inside

Shapes: B batch, C latent channels, H W latent size, L image tokens, T text tokens, S glyph tokens, M = L+T,
D hidden, W text width (in text_BTW), E glyph width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hyimg.model.architecture import DiTArch
from hyimg.model.attention import bind_lengths, resolve_attention
from hyimg.model.blocks import DoubleBlock, SingleBlock
from hyimg.model.conditioning import TextCondition
from hyimg.model.layers import ByT5Mapper, FinalLayer, PatchEmbed, TimestepEmbedder
from hyimg.model.padding import stack_padded
from hyimg.model.rope import image_rope
from hyimg.model.text_refiner import TextRefiner

# (block, its arguments) -> its outputs: how a block is run. `hyimg.memory` puts streaming, recomputation and
# offloading here
RunBlock = Callable[..., Any]


def run_plainly(block: nn.Module, *args: Any) -> Any:
    """Calls the block: its weights are on the device, and autograd keeps its activations."""
    return block(*args)


class DiT(nn.Module):
    """HunyuanImage-2.1's transformer, of any size. Parameter names are the original checkpoint's."""

    def __init__(self, arch: DiTArch, *, attn_mode: str = "torch") -> None:
        super().__init__()
        self.arch = arch
        self.attention = resolve_attention(attn_mode)
        self.run_block: RunBlock = run_plainly

        self.img_in = PatchEmbed(arch)
        self.txt_in = TextRefiner(arch)
        self.byt5_in = ByT5Mapper(arch)
        self.time_in = TimestepEmbedder(arch.hidden)
        self.time_r_in = TimestepEmbedder(arch.hidden) if arch.meanflow else None
        self.guidance_in = TimestepEmbedder(arch.hidden) if arch.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleBlock(arch) for _ in range(arch.num_double))
        self.single_blocks = nn.ModuleList(SingleBlock(arch) for _ in range(arch.num_single))
        self.final_layer = FinalLayer(arch)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that forward computes in and returns (that of the layers outside the blocks)."""
        return self.img_in.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the layers outside the blocks."""
        return self.img_in.proj.weight.device

    @property
    def blocks(self) -> list[nn.Module]:
        """The double, then the single blocks: the order in which `forward` runs them."""
        return [*self.double_blocks, *self.single_blocks]

    def forward(
        self,
        latent_BCHW: Tensor,
        timestep_B: Tensor,
        text: TextCondition,
        *,
        guidance_B: Tensor | None = None,
        timestep_r_B: Tensor | None = None,
    ) -> Tensor:
        """The velocity (noise - latent) at a noisy latent, (B, C, H, W) in the weights' dtype.

        `timestep_B` is sigma * 1000 in float32. The distilled model needs `guidance_B`, the guidance scale
        * 1000, and `timestep_r_B`, the timestep that the step leads to; others take neither.
        """
        height, width = latent_BCHW.shape[-2:]
        vec_BD = self._conditioning(timestep_B, guidance_B, timestep_r_B)
        txt_BTD, txt_lengths = self._text_tokens(text, timestep_B)
        img_BLD: Tensor = self.img_in(latent_BCHW.to(self.dtype))

        num_image, num_text = img_BLD.shape[1], txt_BTD.shape[1]
        rope = image_rope(height, width, self.arch.head_dim, img_BLD.device, num_text)
        attend = bind_lengths(self.attention, [num_image + n for n in txt_lengths], num_image + num_text)

        for block in self.double_blocks:
            img_BLD, txt_BTD = self.run_block(block, img_BLD, txt_BTD, vec_BD, rope, attend)
        x_BMD = torch.cat([img_BLD, txt_BTD], dim=1)
        for block in self.single_blocks:
            x_BMD = self.run_block(block, x_BMD, vec_BD, rope, attend)

        velocity_BLC: Tensor = self.final_layer(x_BMD[:, :num_image], vec_BD)
        return rearrange(velocity_BLC, "b (h w) c -> b c h w", h=height, w=width).contiguous()

    def _conditioning(
        self, timestep_B: Tensor, guidance_B: Tensor | None, timestep_r_B: Tensor | None
    ) -> Tensor:
        """The vector (B, D) that modulates every block."""
        assert (timestep_r_B is not None) == self.arch.meanflow, "a second timestep is for a distilled model"
        assert (guidance_B is not None) == self.arch.guidance_embed, "guidance is for a distilled model"
        vec_BD: Tensor = self.time_in(timestep_B, self.dtype)
        if self.time_r_in is not None:
            vec_BD = (vec_BD + self.time_r_in(timestep_r_B, self.dtype)) / 2
        if self.guidance_in is not None:
            vec_BD = vec_BD + self.guidance_in(guidance_B, self.dtype)
        return vec_BD

    def _text_tokens(self, text: TextCondition, timestep_B: Tensor) -> tuple[Tensor, list[int]]:
        """Glyph tokens, then text tokens of each prompt: (B, T, D) padded at the end, and the lengths."""
        text_BTW, text_lengths = _trim(text.text_BTD.to(self.dtype), text.text_mask_BT)
        txt_BTD: Tensor = self.txt_in(text_BTW, timestep_B, text_lengths, self.attention)
        if text.byt5_BSE is None or text.byt5_mask_BS is None:
            return txt_BTD, text_lengths
        byt5_BSE, byt5_lengths = _trim(text.byt5_BSE.to(self.dtype), text.byt5_mask_BS)
        byt5_BSD: Tensor = self.byt5_in(byt5_BSE)
        samples = zip(byt5_BSD.unbind(), byt5_lengths, txt_BTD.unbind(), text_lengths, strict=True)
        rows = [
            torch.cat([byt5_SD[:num_byt5], txt_TD[:num_text]])
            for byt5_SD, num_byt5, txt_TD, num_text in samples
        ]
        return stack_padded(rows), [len(row) for row in rows]


def _trim(states_BTW: Tensor, mask_BT: Tensor) -> tuple[Tensor, list[int]]:
    """Cuts states to the longest real row and zeroes the rest of shorter ones; also the rows' lengths.

    Zeros, so that not even a NaN in the padding reaches a weight's gradient.
    """
    positions_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    # One transfer from the device for both
    lengths, ends = torch.stack([mask_BT.sum(dim=1), (mask_BT * positions_T).amax(dim=1)]).tolist()
    assert lengths == ends, "real tokens stand before padding"
    num_tokens = max(lengths)
    states_BTW, mask_BT = states_BTW[:, :num_tokens], mask_BT[:, :num_tokens]
    return states_BTW.masked_fill(~mask_BT[..., None], 0), lengths
