"""The glyph byT5 encoder: hidden states of quoted texts, with transformers' T5 encoder.

Shapes: B batch, S glyph tokens, E byT5 width
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyimg.checkpoints.header_check import check_tensors, refuse_other_kind
from hyimg.checkpoints.safetensors_file import Checkpoint
from hyimg.encoders.glyph import NUM_PLAIN_TOKENS, tokenize_glyphs
from hyimg.encoders.qwen import equal_length_batches
from hyimg.encoders.tokenizer import Tokenized
from hyimg.errors import HyimgError

_TABLE = "shared.weight"
# The same table under its tied name; a file may have either, or both
_TIED_TABLE = "encoder.embed_tokens.weight"
_ATTENTION = "encoder.block.0.layer.0.SelfAttention."
_BIAS = _ATTENTION + "relative_attention_bias.weight"
# transformers' T5 computes the second matrix of the feed-forward part in float32 whatever the model's dtype,
# since it overflows in float16
_FLOAT32 = ".DenseReluDense.wo.weight"


@dataclass(frozen=True, kw_only=True)
class ByT5Arch:
    """The sizes of a T5 encoder with gated GELU, all read from its tensors' shapes."""

    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    num_layers: int
    num_buckets: int
    vocab: int

    def read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file."""
        inner = self.num_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            _TABLE: (self.vocab, self.d_model),
            _BIAS: (self.num_buckets, self.num_heads),
            "encoder.final_layer_norm.weight": (self.d_model,),
        }
        for layer in range(self.num_layers):
            block = f"encoder.block.{layer}.layer."
            shapes.update({f"{block}0.SelfAttention.{x}.weight": (inner, self.d_model) for x in "qkv"})
            shapes[f"{block}0.SelfAttention.o.weight"] = (self.d_model, inner)
            shapes[f"{block}0.layer_norm.weight"] = (self.d_model,)
            shapes[f"{block}1.DenseReluDense.wi_0.weight"] = (self.d_ff, self.d_model)
            shapes[f"{block}1.DenseReluDense.wi_1.weight"] = (self.d_ff, self.d_model)
            shapes[f"{block}1.DenseReluDense.wo.weight"] = (self.d_model, self.d_ff)
            shapes[f"{block}1.layer_norm.weight"] = (self.d_model,)
        return shapes


def check_byt5(path: Path | str) -> ByT5Arch:
    """The sizes of the encoder in a file or a Hugging Face folder; only headers are read.

    Raises `HyimgError` for a file of another kind, or that lists all missing, misshapen and unknown tensors.
    """
    return _arch_of(Checkpoint.open(path))


def _arch_of(checkpoint: Checkpoint) -> ByT5Arch:
    path, tensors = checkpoint.path, dict(checkpoint.tensors)
    refuse_other_kind(path, tensors, "byt5")
    tied = tensors.get(_TIED_TABLE)
    if tied is not None and tensors.setdefault(_TABLE, tied).shape == tied.shape:
        del tensors[_TIED_TABLE]

    def shape(name: str) -> tuple[int, int]:
        info = tensors.get(name)
        if info is None or len(info.shape) != 2 or 0 in info.shape:
            raise HyimgError(f"`{path}` has no matrix `{name}`, so its sizes cannot be read")
        return info.shape[0], info.shape[1]

    vocab, d_model = shape(_TABLE)
    num_buckets, num_heads = shape(_BIAS)
    layers = [int(m[1]) for name in tensors if (m := re.match(r"encoder\.block\.(\d+)\.", name))]
    arch = ByT5Arch(
        d_model=d_model,
        num_heads=num_heads,
        head_dim=shape(_ATTENTION + "q.weight")[0] // num_heads,
        d_ff=shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        num_layers=min(1 + max(layers), len(tensors)),  # a name may have a huge number
        num_buckets=num_buckets,
        vocab=vocab,
    )
    check_tensors(path, arch.read_shapes(), tensors, model="the glyph byT5 encoder")
    if vocab < NUM_PLAIN_TOKENS:
        raise HyimgError(
            f"`{path}` has a vocabulary of {vocab} tokens, but byT5 has at least {NUM_PLAIN_TOKENS}"
        )
    return arch


@dataclass(frozen=True)
class ByT5Encoder:
    """The encoder; its weights are read with the first quoted text and then stay on `device`.

    `dtype` None is the file's (float16 in the release); `wo` is always float32.
    """

    checkpoint: Checkpoint
    arch: ByT5Arch
    device: torch.device
    dtype: torch.dtype | None = None
    batch_size: int = 8

    @staticmethod
    def open(
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 8,
        mmap: bool = True,
    ) -> ByT5Encoder:
        """Checks the header of the file; no weight is read. Raises `HyimgError` as `check_byt5`."""
        checkpoint = Checkpoint.open(path, mmap=mmap)
        return ByT5Encoder(checkpoint, _arch_of(checkpoint), torch.device(device), dtype, batch_size)

    def tokenize(self, glyph_prompt: str) -> Tokenized:
        """The ids of a glyph prompt, at most 128, with the tokens that this file has rows for."""
        return tokenize_glyphs(glyph_prompt, num_rows=self.arch.vocab)

    def encode(self, glyph_prompts: Sequence[str | None]) -> list[Tensor | None]:
        """The states (S, E) of each prompt of `glyph.glyph_prompt`, S at most 128; None for None.

        On the CPU, in the model's dtype.
        """
        indices = [i for i, prompt in enumerate(glyph_prompts) if prompt is not None]
        rows = [self.tokenize(p).ids for p in glyph_prompts if p is not None]
        states: list[Tensor | None] = [None] * len(glyph_prompts)
        for index, states_SE in zip(indices, self.hidden_states(rows), strict=True):
            states[index] = states_SE
        return states

    @torch.no_grad()
    def hidden_states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states (S, E) of each row of token ids, on the CPU, in the model's dtype."""
        states: dict[int, Tensor] = {}
        for batch in equal_length_batches([len(row) for row in rows], self.batch_size):
            ids_BS = torch.tensor([rows[i] for i in batch], device=self.device)
            out_BSE: Tensor = self._model(input_ids=ids_BS).last_hidden_state
            states.update((i, row_SE.clone()) for i, row_SE in zip(batch, out_BSE.cpu(), strict=True))
        return [states[i] for i in range(len(rows))]

    @cached_property
    def _model(self) -> Any:
        from transformers import T5Config, T5EncoderModel

        arch = self.arch
        config = T5Config(
            vocab_size=arch.vocab,
            d_model=arch.d_model,
            d_kv=arch.head_dim,
            d_ff=arch.d_ff,
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            relative_attention_num_buckets=arch.num_buckets,
            relative_attention_max_distance=128,
            layer_norm_epsilon=1e-6,
            feed_forward_proj="gated-gelu",
        )
        with torch.device("meta"):
            model = T5EncoderModel(config)
        state = {name: self._read(name) for name in arch.read_shapes()}
        # Tied to the table; it would stay on the meta device
        state[_TIED_TABLE] = state[_TABLE]
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def _read(self, name: str) -> Tensor:
        dtype = torch.float32 if name.endswith(_FLOAT32) else self.dtype
        if name == _TABLE and name not in self.checkpoint.tensors:
            name = _TIED_TABLE
        return self.checkpoint.read(name, self.device).to(dtype=dtype)
