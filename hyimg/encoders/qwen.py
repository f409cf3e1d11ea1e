"""Qwen2.5-VL's language model as a text encoder, with one layer of the 7B model on the device at a time.

A sweep takes a bounded set of prompts through all layers: a layer's weights are read from the file and all batches
go through it while the next layer is read. So the encoder needs the memory of two layers, not 16 GB, and reads its file
once per sweep. The rows of a batch have equal length: nothing is padded, and a prompt's cache entry does not depend on
the others.

For text tokens the three positions of the vision-language model's rotary embedding are equal, so it is the plain one.
Agrees with transformers' `Qwen2_5_VLDecoderLayer`.

Shapes: B batch, T text tokens, D hidden, N query heads, M key/value heads, K head size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hyimg.checkpoints.safetensors_file import Checkpoint
from hyimg.encoders.qwen_checkpoint import QwenArch, arch_of, check_qwen
from hyimg.encoders.tokenizer import TEMPLATE_TOKENS, QwenTokenizer
from hyimg.errors import HyimgError
from hyimg.memory.fp8 import dequantize, quantize, require_fp8_device


class Fp8Weight(NamedTuple):
    """A matrix in scaled fp8, as returned by `hyimg.memory.fp8.quantize`."""

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
    """The rotations of positions 0 to `num_tokens` - 1, (T, K) in `dtype` (RoFormer, section 3.2.2, in two halves).

    Angles are always computed in float32; the rounding of bfloat16 frequencies would cause errors of 0.5.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32, device=device) / arch.head_dim
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    half = torch.outer(positions, 1.0 / arch.rope_theta**exponents)
    angles_TK = torch.cat([half, half], dim=-1)
    return Rotation(angles_TK.cos().to(dtype), angles_TK.sin().to(dtype))


def decoder_layer(
    hidden_BTD: Tensor, weights: Mapping[str, Weight], arch: QwenArch, rotary: Rotation
) -> Tensor:
    """A layer's output (B, T, D) for rows without padding, in the input's dtype; `weights` as in `layer_shapes`."""
    normed_BTD = _rms_norm(hidden_BTD, weights["input_layernorm.weight"], arch.rms_eps)
    hidden_BTD = hidden_BTD + _attention(normed_BTD, weights, arch, rotary)
    normed_BTD = _rms_norm(hidden_BTD, weights["post_attention_layernorm.weight"], arch.rms_eps)
    return hidden_BTD + _mlp(normed_BTD, weights)


def _linear(x: Tensor, weights: Mapping[str, Weight], name: str) -> Tensor:
    """A module's linear layer; its weight is dequantised first if it is fp8, its bias is optional."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    assert not isinstance(bias, Fp8Weight)
    if isinstance(weight, Fp8Weight):
        return F.linear(x, dequantize(weight.q_OI, weight.scale, x.dtype), bias)
    return F.linear(x, weight, bias)


def _rms_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """RMS norm in float32, multiplied by the weight in the input's dtype."""
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


def equal_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of rows with these lengths, in batches of at most `batch_size` rows of equal length.

    The longest rows come first, so that too little memory shows at once; rows of equal length keep their order.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups = (list(group) for _, group in groupby(order, key=lengths.__getitem__))
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


__all__ = ["OnLayer", "QwenArch", "QwenEncoder", "check_qwen"]

# Called with (layers done, layers in total) after each layer of each sweep
OnLayer = Callable[[int, int], None]

# Hidden states of one sweep: 300,000 tokens of the 7B model in bfloat16
SWEEP_BYTES = 2 << 30
# Hidden states of a sweep stay on the device up to this size; above it they are on the host between layers
RESIDENT_BYTES = 256 << 20


@dataclass(frozen=True)
class QwenEncoder:
    """The first n-2 layers of Qwen2.5-VL's language model, read from the file when needed.

    Weights are cast to `dtype`, in which the layers compute; a batch has at most `batch_size` prompts of equal length.
    With `fp8` the matrices of a layer are quantised when read, and dequantised for use. Nothing stays on the device
    between calls.
    """

    checkpoint: Checkpoint
    arch: QwenArch
    tokenizer: QwenTokenizer
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    batch_size: int = 8
    on_layer: OnLayer | None = None
    fp8: bool = False

    @staticmethod
    def open(
        path: Path | str,
        *,
        tokenizer: QwenTokenizer,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 8,
        mmap: bool = True,
        on_layer: OnLayer | None = None,
        fp8: bool = False,
    ) -> QwenEncoder:
        """Checks the headers of a single file or a Hugging Face folder; no weight is read.

        Raises `HyimgError` as `check_qwen`, if the tokenizer has more tokens than the embedding, and if the device has
        no fp8.
        """
        if fp8:
            require_fp8_device(torch.device(device))
        checkpoint = Checkpoint.open(path, mmap=mmap)
        arch = arch_of(checkpoint)
        if tokenizer.num_tokens > arch.vocab:
            raise HyimgError(
                f"the tokenizer in `{tokenizer.source}` has {tokenizer.num_tokens} tokens, but the text "
                f"encoder `{path}` only {arch.vocab}",
                hint="give the tokenizer that belongs to this text encoder with `--tokenizer`",
            )
        return QwenEncoder(
            checkpoint, arch, tokenizer, torch.device(device), dtype, batch_size, on_layer, fp8
        )

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """The states (T, D) of each prompt after layer n-2, without the template's 34 tokens.

        On the CPU, in `dtype`, all in memory at once; use `encode_each` for thousands of prompts.
        """
        states = dict(self.encode_each([self.tokenizer.encode(prompt).ids for prompt in prompts]))
        return [states[index] for index in range(len(prompts))]

    def encode_each(
        self, rows: Sequence[Sequence[int]], lengths: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """As `encode`, from token ids including the template, a sweep at a time: (index of the row, states).

        The longest rows come first. With `lengths` (of the rows), each row is accessed only in its sweep.
        """
        for index, states_TD in self.hidden_states(rows, lengths):
            yield index, states_TD[TEMPLATE_TOKENS:].clone()

    def hidden_states(
        self, rows: Sequence[Sequence[int]], lengths: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, states (T, D) after layer n-2) of each row of token ids, on the CPU, in `dtype`."""
        lengths = [len(row) for row in rows] if lengths is None else lengths
        sweeps = self._sweeps(equal_length_batches(lengths, self.batch_size), lengths)
        for number, sweep in enumerate(sweeps):
            tokens = [torch.tensor([rows[i] for i in batch]) for batch in sweep]
            states = self._sweep(tokens, number, len(sweeps))
            for batch, hidden_BTD in zip(sweep, states, strict=True):
                yield from zip(batch, hidden_BTD.cpu(), strict=True)

    def _sweeps(self, batches: Sequence[list[int]], lengths: Sequence[int]) -> list[list[list[int]]]:
        """The batches in groups whose hidden states take at most `SWEEP_BYTES`, or of one batch."""
        sweeps: list[list[list[int]]] = []
        room = 0
        for batch in batches:
            size = sum(lengths[i] for i in batch) * self.arch.hidden * self.dtype.itemsize
            if not sweeps or size > room:
                sweeps.append([])
                room = SWEEP_BYTES
            sweeps[-1].append(batch)
            room -= size
        return sweeps

    @torch.no_grad()
    def _sweep(self, tokens: Sequence[Tensor], number: int, num_sweeps: int) -> list[Tensor]:
        """The states (B, T, D) of each batch of ids (B, T) after all layers."""
        num_bytes = sum(ids_BT.numel() for ids_BT in tokens) * self.arch.hidden * self.dtype.itemsize
        waiting = self.device if num_bytes <= RESIDENT_BYTES else torch.device("cpu")
        states = [hidden_BTD.to(waiting) for hidden_BTD in self._embed(tokens)]
        longest = max(ids_BT.shape[1] for ids_BT in tokens)
        rotary = rotation(self.arch, longest, device=self.device, dtype=self.dtype)
        num_layers = self.arch.num_read_layers
        with ThreadPoolExecutor(max_workers=1) as reader:
            upcoming = reader.submit(self._read_layer, 0)
            for layer in range(num_layers):
                weights = upcoming.result()  # frees the previous layer before the next is read
                if layer + 1 < num_layers:
                    upcoming = reader.submit(self._read_layer, layer + 1)
                for i, waiting_BTD in enumerate(states):
                    here = rotary.first(waiting_BTD.shape[1])
                    hidden_BTD = decoder_layer(waiting_BTD.to(self.device), weights, self.arch, here)
                    states[i] = hidden_BTD.to(waiting)
                if self.on_layer is not None:
                    self.on_layer(number * num_layers + layer + 1, num_sweeps * num_layers)
        return states

    def _embed(self, tokens: Sequence[Tensor]) -> Iterator[Tensor]:
        """Embeds on the host: of the memory-mapped table, a gigabyte, only the needed rows are read."""
        table_VD = self.checkpoint.read(self.arch.embedding_name)
        for ids_BT in tokens:
            yield F.embedding(ids_BT, table_VD).to(self.dtype)

    def _read_layer(self, layer: int) -> dict[str, Weight]:
        prefix = self.arch.layer_prefix(layer)
        weights: dict[str, Weight] = {}
        for name, shape in self.arch.layer_shapes().items():
            tensor = self.checkpoint.read(prefix + name, self.device)
            is_fp8 = self.fp8 and len(shape) == 2
            weights[name] = Fp8Weight(*quantize(tensor)) if is_fp8 else tensor.to(self.dtype)
        return weights
