"""A DiT file with LoRAs merged into it: in the names, types and metadata of the file that it comes from.

One tensor is in memory at a time: what no LoRA stands on is copied, and what one does is summed in float32 and
rounded once to its own type.

Shapes: I input features, O output features
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.lora.base import Adapter
from hyimg.lora.network import LoRANetwork
from hyimg.lora.writer import OutputTensor, stored_chunks, write_tensors
from hyimg.model.header_check import read_dit
from hyimg.model.safetensors_file import Checkpoint, Header
from hyimg.report import Reporter, Task

MERGED_KEY = "hyimg_merged_loras"
"""The metadata key under which a merged file tells its LoRAs, as JSON."""

Merges = Sequence[tuple[Adapter, float]]


def refuse_merging_into_fp8(dit: Path, option: str, hint: str) -> None:
    """Raises HyimgError, naming the option, where a DiT file is fp8: its steps are coarser than most updates."""
    quantization = read_dit(Checkpoint.open(dit)).quantization
    if quantization is not None:
        raise HyimgError(
            f"{option} cannot be used with `{dit}`, which is fp8 ({quantization}): fp8 weights are too coarse for "
            "what a LoRA adds to them",
            hint=hint,
        )


def save_merged(
    dit: Path,
    path: Path,
    networks: Sequence[tuple[LoRANetwork, float]],
    records: Sequence[Mapping[str, object]],
    report: Reporter,
) -> None:
    """Writes `dit`, a file or a sharded folder, as one file with networks merged at their multipliers, in order.

    `records` tell of the networks in the metadata. The file appears whole or not at all; raises as `atomic_path`.
    """
    checkpoint = Checkpoint.open(dit, mmap=False)
    key_map = read_dit(checkpoint).key_map
    merges: dict[str, list[tuple[Adapter, float]]] = {}
    for network, multiplier in networks:
        for module, lora in network.adapters():
            merges.setdefault(f"{module.name}.weight", []).append((lora, multiplier))
    merged = {
        part: _Merged(checkpoint, key_map[weight].parts, number, merges[weight])
        for weight in merges
        for number, part in enumerate(key_map[weight].parts)
    }
    with report.task("save the merged model", len(checkpoint.tensors), unit="tensor") as task:
        outputs = [
            OutputTensor(
                name,
                info.dtype,
                info.shape,
                info.end - info.start,
                _Chunks(header, name, merged.get(name), task),
            )
            for header in checkpoint.headers
            for name, info in header.tensors.items()
        ]
        metadata = {**checkpoint.metadata, MERGED_KEY: json.dumps(list(records))}
        write_tensors(path, outputs, metadata)


@dataclass(frozen=True)
class _Merged:
    """A tensor of the file that is one of the `parts` of a merged weight: a range of its rows, or all of them."""

    checkpoint: Checkpoint
    parts: Sequence[str]
    number: int
    merges: Merges

    @torch.no_grad()
    def tensor(self) -> Tensor:
        """The rows of this part, in the type of the file."""
        tensors = [self.checkpoint.read(part) for part in self.parts]
        # a DoRA's rows, and a delta's, are those of the whole weight
        base_OI = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        merged_OI = base_OI
        for lora, multiplier in self.merges:
            merged_OI = lora.merged(merged_OI, multiplier, base_OI=base_OI)
        rows = torch.split(merged_OI, [len(tensor) for tensor in tensors])
        return rows[self.number].to(tensors[self.number].dtype)


@dataclass(frozen=True)
class _Chunks:
    """The bytes of one tensor, made when they are written."""

    header: Header
    name: str
    merged: _Merged | None
    task: Task

    def __call__(self) -> Iterator[bytes | memoryview]:
        info = self.header.tensors[self.name]
        if self.merged is None:
            start = self.header.data_start + info.start
            yield from stored_chunks(self.header.path, start, start + info.end - info.start)
        else:
            yield self.merged.tensor().contiguous().view(torch.uint8).reshape(-1).numpy().data
        self.task.advance()
