"""What a prompt is to the DiT: the text encoder's tokens and, for quoted text, the glyph encoder's.

Shapes: B batch, T text tokens (Qwen), S glyph tokens (byT5), D text width, E byT5 width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts of one batch, padded at the end; a mask is True where a token is real.

    The two byT5 fields are None where no prompt of the batch quotes text. What stands in padded positions
    never influences a result.
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
        """The same on another device, its states in another dtype; masks stay bool."""
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
