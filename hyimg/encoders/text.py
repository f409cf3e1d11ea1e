"""What a prompt means to the DiT: Qwen's states of the whole prompt, byT5's of the quoted texts.

Shapes: T text tokens, D hidden, S glyph tokens, E byT5 width
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from hyimg.cache.identity import Memo, file_identity, hash_bytes
from hyimg.encoders.byt5 import ByT5Encoder
from hyimg.encoders.byt5_tokens import MAX_GLYPH_TOKENS
from hyimg.encoders.glyph import glyph_prompt
from hyimg.encoders.qwen import OnLayer, QwenEncoder
from hyimg.encoders.qwen_checkpoint import NUM_UNUSED_LAYERS
from hyimg.encoders.template import MAX_TOKENS, TEMPLATE_TOKENS, fill_template
from hyimg.encoders.tokenizer import QwenTokenizer, load_qwen_tokenizer

# Part of the identity: a change of the rules that nothing else in it tells (the glyph rule, say) raises it
RULES_VERSION = 1

# How weights are quantised where they are, as the identity tells it
FP8_RULE = "e4m3, a scale for 64 values"

# Prompts whose quoted texts are looked at together, so that those of equal length make a batch
GLYPH_GROUP = 64


@dataclass(frozen=True)
class EncodedText:
    """One prompt's condition: valid tokens only, on the CPU, in the encoders' own dtypes.

    `byt5_SE` is None where the prompt quotes nothing. `num_cut` tokens of the template-filled prompt did not
    fit in 1024 + 34, `num_glyph_cut` bytes of the quoted texts not in 128.
    """

    text_TD: Tensor
    byt5_SE: Tensor | None
    num_cut: int = 0
    num_glyph_cut: int = 0


@dataclass(frozen=True)
class TextEncoders:
    """Both encoders. `memo` remembers the content hashes of their files, which `identity` is made of."""

    qwen: QwenEncoder
    byt5: ByT5Encoder
    memo: Memo | None = None

    @staticmethod
    def open(
        text_encoder: Path | str,
        byt5: Path | str,
        tokenizer: Path | QwenTokenizer | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        fp8: bool = False,
        byt5_dtype: torch.dtype | None = None,
        batch_size: int = 8,
        mmap: bool = True,
        memo: Memo | None = None,
        on_layer: OnLayer | None = None,
    ) -> TextEncoders:
        """Checks headers and tokenizer; no weight is read. `tokenizer` as `load_qwen_tokenizer`, or loaded.

        `dtype` and `fp8` are Qwen's, `byt5_dtype` None the file's own; `on_layer` reports Qwen's layers. Raises
        `HyimgError` for files that are not what they should be.
        """
        if not isinstance(tokenizer, QwenTokenizer):
            tokenizer = load_qwen_tokenizer(tokenizer, Path(text_encoder))
        qwen = QwenEncoder.open(
            text_encoder,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            fp8=fp8,
            batch_size=batch_size,
            mmap=mmap,
            on_layer=on_layer,
        )
        glyphs = ByT5Encoder.open(byt5, device=device, dtype=byt5_dtype, batch_size=batch_size, mmap=mmap)
        return TextEncoders(qwen, glyphs, memo)

    @cached_property
    def identity(self) -> str:
        """sha256 over everything that an encoded text depends on beside the prompt; 64 hex digits.

        Both files' contents, the tokenizer, the template and its limits, the layer taken, the dtypes, fp8 or
        not; never the device or the batch size. Reads the files whole unless `memo` knows them.
        """
        recipe: dict[str, object] = {
            "rules": RULES_VERSION,
            "qwen": file_identity(self.qwen.checkpoint.path, self.memo),
            "qwen_dtype": str(self.qwen.dtype),
            "layer": -1 - NUM_UNUSED_LAYERS,
            "tokenizer": self.qwen.tokenizer.identity,
            "template": fill_template("{}"),
            "template_tokens": TEMPLATE_TOKENS,
            "max_tokens": MAX_TOKENS,
            "byt5": file_identity(self.byt5.checkpoint.path, self.memo),
            "byt5_dtype": str(self.byt5.dtype),
            "max_glyph_tokens": MAX_GLYPH_TOKENS,
        }
        if self.qwen.fp8:
            recipe["qwen_weights"] = FP8_RULE
        return hash_bytes(json.dumps(recipe, sort_keys=True).encode())

    def encode(self, prompts: Sequence[str]) -> list[EncodedText]:
        """The conditions of the prompts, in their order; all in memory at once."""
        encoded = dict(self.encode_each(prompts))
        return [encoded[index] for index in range(len(prompts))]

    def encode_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, EncodedText]]:
        """(index of the prompt, its condition) for each prompt, in the order of token length.

        Memory is bounded whatever the number of prompts, so that a cache can be written on the way.
        """
        tokenized = [self.qwen.tokenizer.encode(prompt) for prompt in prompts]
        states = self.qwen.encode_each([text.ids for text in tokenized])
        while group := list(islice(states, GLYPH_GROUP)):
            glyphs = [glyph_prompt(prompts[index]) for index, _ in group]
            for (index, text_TD), glyph, byt5_SE in zip(group, glyphs, self.byt5.encode(glyphs), strict=True):
                num_glyph_cut = self.byt5.tokenize(glyph).num_cut if glyph is not None else 0
                yield index, EncodedText(text_TD, byt5_SE, tokenized[index].num_cut, num_glyph_cut)
