"""The diffusion transformer of HunyuanImage-2.1: predicts a velocity from a noisy latent, a timestep and a prompt.

- image and text tokens pass 20 double, then 40 single blocks, image first
- Qwen's text tokens pass a refiner; byT5's glyph tokens, for quoted text, pass a small MLP and precede them
- the distilled model adds a guidance value and a second timestep to the conditioning vector
- forward runs in the weights' dtype; norms, rotary angles and timestep features are float32 inside

Shapes: B batch, C latent channels, H W latent size, L image tokens, T text tokens, S glyph tokens, M = L+T,
D hidden (in text_BTD text width), W text width, E glyph width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hyimg.checkpoints.architecture import DiTArch
from hyimg.model.attention import bind_lengths, resolve_attention, stack_padded
from hyimg.model.blocks import DoubleBlock, SingleBlock
from hyimg.model.layers import ByT5Mapper, FinalLayer, PatchEmbed, TimestepEmbedder
from hyimg.model.rope import image_rope
from hyimg.model.text_refiner import TextRefiner


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts of a batch, padded at the end; bool masks are True for real tokens.

    The byT5 fields are None if no prompt of the batch quotes text. Padding never influences a result.
    """

    text_BTD: Tensor
    text_mask_BT: Tensor
    byt5_BSE: Tensor | None = None
    byt5_mask_BS: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.text_BTD.shape[:2] == self.text_mask_BT.shape
        assert self.text_mask_BT.dtype == torch.bool
        assert (self.byt5_BSE is None) == (self.byt5_mask_BS is None)
        if self.byt5_BSE is not None and self.byt5_mask_BS is not None:
            assert self.byt5_BSE.shape[:2] == self.byt5_mask_BS.shape
            assert self.byt5_mask_BS.dtype == torch.bool
            assert len(self.byt5_BSE) == len(self.text_BTD)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> TextCondition:
        """Moves to a device, and the states, not the masks, to a dtype."""
        return TextCondition(
            self.text_BTD.to(device=device, dtype=dtype),
            self.text_mask_BT.to(device=device),
            None if self.byt5_BSE is None else self.byt5_BSE.to(device=device, dtype=dtype),
            None if self.byt5_mask_BS is None else self.byt5_mask_BS.to(device=device),
        )


def collate(items: Sequence[tuple[Tensor, Tensor | None]]) -> TextCondition:
    """Pads encoded prompts `(text_TD, byt5_SE or None)` with zeros to the longest of the batch."""
    assert items, "a batch has at least one prompt"
    text_BTD, text_mask_BT = _pad([text_TD for text_TD, _ in items])
    glyphs = [byt5_SE for _, byt5_SE in items]
    present = [byt5_SE for byt5_SE in glyphs if byt5_SE is not None and len(byt5_SE)]
    if not present:
        return TextCondition(text_BTD, text_mask_BT)
    none = present[0].new_zeros(0, present[0].shape[1])
    return TextCondition(text_BTD, text_mask_BT, *_pad([none if g is None else g for g in glyphs]))


def _pad(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lengths_B1 = torch.tensor([len(s) for s in states], device=states[0].device)[:, None]
    padded = pad_sequence(list(states), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths_B1


# (block, its arguments) -> its outputs. `hyimg.memory` adds streaming, recomputation and offloading here
RunBlock = Callable[..., Any]


def run_block(block: nn.Module, *args: Any) -> Any:
    """Calls a block whose weights are on the device, and keeps its activations for backward."""
    return block(*args)


class DiT(nn.Module):
    """HunyuanImage-2.1's transformer, in any size. Parameters are named as in the original checkpoint."""

    def __init__(self, arch: DiTArch, *, attn_mode: str = "torch") -> None:
        super().__init__()
        self.arch = arch
        self.attention = resolve_attention(attn_mode)
        self.run_block: RunBlock = run_block

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
        """The dtype of forward: that of the layers outside the blocks."""
        return self.img_in.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the layers outside the blocks."""
        return self.img_in.proj.weight.device

    @property
    def blocks(self) -> list[nn.Module]:
        """The double, then the single blocks, in the order of `forward`."""
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
        """Predicts the velocity (noise - latent) at a noisy latent (B, C, H, W) of any dtype, in the weights' dtype.

        `timestep_B` is sigma * 1000 in float32. The distilled model also needs, and others do not take, the guidance
        scale * 1000 (`guidance_B`) and the timestep that the step leads to (`timestep_r_B`), both float32.
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
        assert (timestep_r_B is not None) == self.arch.meanflow, (
            "only a distilled model takes a second timestep"
        )
        assert (guidance_B is not None) == self.arch.guidance_embed, "only a distilled model takes guidance"
        vec_BD: Tensor = self.time_in(timestep_B, self.dtype)
        if self.time_r_in is not None:
            vec_BD = (vec_BD + self.time_r_in(timestep_r_B, self.dtype)) / 2
        if self.guidance_in is not None:
            vec_BD = vec_BD + self.guidance_in(guidance_B, self.dtype)
        return vec_BD

    def _text_tokens(self, text: TextCondition, timestep_B: Tensor) -> tuple[Tensor, list[int]]:
        """Each prompt's glyph tokens, then text tokens: (B, T, D), padded at the end, and their lengths."""
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
    """Trims states to the longest row of real tokens and zeroes padding; also returns the rows' lengths.

    Zeros keep even a NaN in the padding out of the weights' gradients.
    """
    positions_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    # One transfer from the device
    lengths, ends = torch.stack([mask_BT.sum(dim=1), (mask_BT * positions_T).amax(dim=1)]).tolist()
    assert lengths == ends, "real tokens precede padding"
    num_tokens = max(lengths)
    states_BTW, mask_BT = states_BTW[:, :num_tokens], mask_BT[:, :num_tokens]
    return states_BTW.masked_fill(~mask_BT[..., None], 0), lengths
