"""Both text encoders: Qwen's hidden states of a prompt, and byT5's of the texts that it quotes.

Shapes: T text tokens, D hidden, S glyph tokens, E byT5 width
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch

from hyimg.cache.hashing import Memo, file_identity, hash_bytes
from hyimg.cache.prompt_embeddings import DTYPE, ENCODERS, PromptEmbedding
from hyimg.encoders.byt5 import ByT5Encoder
from hyimg.encoders.glyph import MAX_GLYPH_TOKENS, glyph_prompt, lint_prompt
from hyimg.encoders.qwen import OnLayer, QwenEncoder
from hyimg.encoders.qwen_checkpoint import NUM_UNUSED_LAYERS
from hyimg.encoders.tokenizer import (
    MAX_TOKENS,
    TEMPLATE_TOKENS,
    PromptRows,
    QwenTokenizer,
    fill_template,
    load_qwen_tokenizer,
)
from hyimg.errors import first_few
from hyimg.memory.precision import TEXT_ENCODER_DTYPES
from hyimg.report import Reporter, Task, count_text

# Part of the identity: raised for a change that nothing else in it shows (of the glyph rule, for example)
RULES_VERSION = 1

# How weights are quantised with fp8, for the identity
FP8_RULE = "e4m3, a scale for 64 values"

# Prompts whose quoted texts are encoded together, so that those of equal length are batched
GLYPH_GROUP = 64

_DTYPE_NAMES = {dtype: name for name, dtype in TEXT_ENCODER_DTYPES.items()}


@dataclass(frozen=True)
class TextEncoders:
    """Both encoders. `memo` remembers the content hashes of their files, which are part of `identity`."""

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
        """Checks headers and tokenizer; no weight is read. `tokenizer` is a path as for `load_qwen_tokenizer`.

        `dtype` and `fp8` are for Qwen; `byt5_dtype` None is the file's dtype. `on_layer` is called after each of Qwen's
        layers. Raises `HyimgError` for files of another kind.
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
        """sha256 over everything but the prompt that an embedding depends on; 64 hex digits.

        These are both files' contents, the tokenizer, the template and its limits, the layer used, the dtypes, and fp8;
        not the device or the batch size. Reads the files completely unless `memo` knows them.
        """
        dtypes = {"qwen_dtype": str(self.qwen.dtype), "byt5_dtype": str(self.byt5.dtype)}
        return hash_bytes(json.dumps({**self._recipe, **dtypes}, sort_keys=True).encode())

    @property
    def about(self) -> dict[str, str]:
        """What a text store records about these encoders: Qwen's dtype, and a hash that is independent of dtypes."""
        any_type = hash_bytes(json.dumps(self._recipe, sort_keys=True).encode())
        return {DTYPE: _DTYPE_NAMES[self.qwen.dtype], ENCODERS: any_type}

    def in_dtypes(self, names: Sequence[str]) -> list[TextEncoders]:
        """The same encoders with Qwen in each of these dtypes ("bf16", "fp32"), in order.

        Each first with byT5 in its current dtype, then in the others in which it may have been run.
        """
        byt5_dtypes = dict.fromkeys((self.byt5.dtype, torch.float32, None))
        found = []
        for qwen_dtype in (TEXT_ENCODER_DTYPES[name] for name in names):
            for byt5_dtype in byt5_dtypes:
                qwen, byt5 = replace(self.qwen, dtype=qwen_dtype), replace(self.byt5, dtype=byt5_dtype)
                other = replace(self, qwen=qwen, byt5=byt5)
                other.__dict__["_recipe"] = self._recipe  # hash the files only once
                found.append(other)
        return found

    @cached_property
    def _recipe(self) -> dict[str, object]:
        """The parts of the identity except for the dtypes."""
        recipe: dict[str, object] = {
            "rules": RULES_VERSION,
            "qwen": file_identity(self.qwen.checkpoint.path, self.memo),
            "layer": -1 - NUM_UNUSED_LAYERS,
            "tokenizer": self.qwen.tokenizer.identity,
            "template": fill_template("{}"),
            "template_tokens": TEMPLATE_TOKENS,
            "max_tokens": MAX_TOKENS,
            "byt5": file_identity(self.byt5.checkpoint.path, self.memo),
            "max_glyph_tokens": MAX_GLYPH_TOKENS,
        }
        if self.qwen.fp8:
            recipe["qwen_weights"] = FP8_RULE
        return recipe

    def encode(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        """The embedding of each prompt; all in memory at once."""
        encoded = dict(self.encode_each(prompts))
        return [encoded[index] for index in range(len(prompts))]

    def encode_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, PromptEmbedding]]:
        """(index of the prompt, its embedding) for each prompt, longest first.

        Memory is bounded whatever the number of prompts, so a cache can be written meanwhile.
        """
        rows = PromptRows(self.qwen.tokenizer, prompts)
        states = self.qwen.encode_each(rows, rows.lengths)
        while group := list(islice(states, GLYPH_GROUP)):
            glyphs = [glyph_prompt(prompts[index]) for index, _ in group]
            for (index, text_TD), byt5_SE in zip(group, self.byt5.encode(glyphs), strict=True):
                yield index, PromptEmbedding(text_TD, byt5_SE)


_MOST_CHARACTERS = 60


def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], report: Reporter
) -> Iterator[tuple[str, PromptEmbedding]]:
    """(prompt, its embedding) for each prompt, longest first, with progress; warns of truncated prompts first."""
    _warn_truncated(encoders, prompts, report)
    with ExitStack() as stack:
        task: Task | None = None

        def on_layer(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                title = f"encode {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}"
                task = stack.enter_context(report.task(title, total, unit="layer"))
            task.advance()

        watched = replace(encoders, qwen=replace(encoders.qwen, on_layer=on_layer))
        for index, encoded in watched.encode_each(prompts):
            yield prompts[index], encoded


def _warn_truncated(encoders: TextEncoders, prompts: Sequence[str], report: Reporter) -> None:
    """One warning for the prompts over the text encoder's limit, and one for those over byT5's."""
    cut: list[str] = []
    quoted: list[str] = []
    for prompt in dict.fromkeys(prompts):
        lint = lint_prompt(prompt, encoders.qwen.tokenizer)
        if lint.num_cut:
            cut.append(f"{_name(prompt)} ({count_text(lint.num_cut, 'token')})")
        if lint.num_glyph_cut:
            quoted.append(f"{_name(prompt)} ({count_text(lint.num_glyph_cut, 'byte')})")
    if cut:
        limit = MAX_TOKENS - TEMPLATE_TOKENS
        report.warning(f"prompt over {limit} tokens, truncated ({len(cut)}): {first_few(cut)}")
    if quoted:
        report.warning(f"quoted text over byT5's limit, truncated ({len(quoted)}): {first_few(quoted)}")


def _name(prompt: str) -> str:
    line = " ".join(prompt.split())
    return f"`{line}`" if len(line) <= _MOST_CHARACTERS else f"`{line[:_MOST_CHARACTERS]}…`"
