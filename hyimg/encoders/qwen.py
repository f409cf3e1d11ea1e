"""Prompts to the hidden states that condition the DiT, one layer of the 7B model on the device at a time.

A sweep takes a bounded set of prompts through all layers: a layer's weights are read from the file, every
batch passes, the next layer follows (and is read meanwhile). So the encoder needs the room of two layers,
not of sixteen gigabytes, and reads its file once a sweep. Rows of a batch have equal length, so that there
is no padding and what is cached for a prompt does not depend on its neighbours.

Shapes: B batch, T text tokens, D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.encoders.batching import equal_length_batches
from hyimg.encoders.qwen_checkpoint import QwenArch, arch_of, check_qwen
from hyimg.encoders.qwen_layer import Fp8Weight, Weight, decoder_layer, rotation
from hyimg.encoders.template import TEMPLATE_TOKENS
from hyimg.encoders.tokenizer import QwenTokenizer
from hyimg.errors import HyimgError
from hyimg.memory.fp8 import quantize, require_fp8_device
from hyimg.model.safetensors_file import Checkpoint

__all__ = ["OnLayer", "QwenArch", "QwenEncoder", "check_qwen"]

# (layers done, layers in all), after each layer of each sweep
OnLayer = Callable[[int, int], None]

# Hidden states of one sweep: in bfloat16, 300,000 tokens of the 7B model
SWEEP_BYTES = 2 << 30
# Hidden states of a sweep stay on the device up to this size, and wait on the host between layers above it
RESIDENT_BYTES = 256 << 20


@dataclass(frozen=True)
class QwenEncoder:
    """The first n-2 layers of Qwen2.5-VL's language model, left in their file until they are needed.

    `dtype` is what the weights are cast to and the layers compute in; `batch_size` the most prompts (of
    equal length) in one batch. With `fp8` the matrices of a layer are quantised as it is read, and dequantised
    where they are used. Nothing stays on the device between calls.
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

        Raises `HyimgError` as `check_qwen`, where the tokenizer has more tokens than the embedding, and where
        the device has no fp8.
        """
        if fp8:
            require_fp8_device(torch.device(device))
        checkpoint = Checkpoint.open(path, mmap=mmap)
        arch = arch_of(checkpoint)
        if tokenizer.num_tokens > arch.vocab:
            raise HyimgError(
                f"the tokenizer in `{tokenizer.source}` has {tokenizer.num_tokens} tokens, and the text "
                f"encoder `{path}` only {arch.vocab}",
                hint="give the tokenizer that belongs to this text encoder with `--tokenizer`",
            )
        return QwenEncoder(
            checkpoint, arch, tokenizer, torch.device(device), dtype, batch_size, on_layer, fp8
        )

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """For each prompt its tokens' states (T, D) after layer n-2, without the template's 34 tokens.

        On the CPU, in `dtype`. All stay in memory at once: for thousands of prompts, `encode_each`.
        """
        states = dict(self.encode_each([self.tokenizer.encode(prompt).ids for prompt in prompts]))
        return [states[index] for index in range(len(prompts))]

    def encode_each(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """As `encode`, from token ids (template and all), a sweep at a time: (index of the row, states).

        Rows come in the order of their length, longest first, and not in that of their index.
        """
        for index, states_TD in self.hidden_states(rows):
            yield index, states_TD[TEMPLATE_TOKENS:].clone()

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """For each row of token ids (index, states (T, D) of all its tokens after layer n-2), on the CPU."""
        batches = equal_length_batches(rows, self.batch_size)
        sweeps = self._sweeps(batches, rows)
        for number, sweep in enumerate(sweeps):
            tokens = [torch.tensor([rows[i] for i in batch]) for batch in sweep]
            states = self._sweep(tokens, number, len(sweeps))
            for batch, hidden_BTD in zip(sweep, states, strict=True):
                yield from zip(batch, hidden_BTD.cpu(), strict=True)

    def _sweeps(self, batches: Sequence[list[int]], rows: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """The batches in groups whose hidden states take at most `SWEEP_BYTES` (or are one batch)."""
        sweeps: list[list[list[int]]] = []
        room = 0
        for batch in batches:
            size = sum(len(rows[i]) for i in batch) * self.arch.hidden * self.dtype.itemsize
            if not sweeps or size > room:
                sweeps.append([])
                room = SWEEP_BYTES
            sweeps[-1].append(batch)
            room -= size
        return sweeps

    @torch.no_grad()
    def _sweep(self, tokens: Sequence[Tensor], number: int, num_sweeps: int) -> list[Tensor]:
        """The states (B, T, D) of each batch of ids (B, T), after one pass through the layers."""
        num_bytes = sum(ids_BT.numel() for ids_BT in tokens) * self.arch.hidden * self.dtype.itemsize
        waiting = self.device if num_bytes <= RESIDENT_BYTES else torch.device("cpu")
        states = [hidden_BTD.to(waiting) for hidden_BTD in self._embed(tokens)]
        longest = max(ids_BT.shape[1] for ids_BT in tokens)
        rotary = rotation(self.arch, longest, device=self.device, dtype=self.dtype)
        num_layers = self.arch.num_read_layers
        with ThreadPoolExecutor(max_workers=1) as reader:
            upcoming = reader.submit(self._read_layer, 0)
            for layer in range(num_layers):
                weights = upcoming.result()  # frees the layer before, and then the next may be read
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
        """Rows are picked on the host: of the table, a gigabyte, a mapping reads only what is picked."""
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
