"""Adapters merged into the base weights: the same function as live adapters, at no cost per step.

Into a model in memory, into one as it is loaded, or into a new DiT file with the names, dtypes and metadata of the
original. A file is written tensor by tensor: adapted weights are summed in float32 and rounded once to their own dtype,
the others are copied.

Shapes: I input features, O output features
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.header_check import OpenedModel, open_dit
from hyimg.checkpoints.model_files import unwrapped
from hyimg.checkpoints.safetensors_file import Checkpoint, Header
from hyimg.checkpoints.safetensors_writer import OutputTensor, stored_chunks, write_tensors
from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA
from hyimg.lora.base import Adapter
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT
from hyimg.model.loading import WeightPlacement, unscale
from hyimg.report import Reporter, Task


def delta(network: AdapterNetwork) -> Mapping[str, Tensor]:
    """What a network of plain LoRAs adds to each weight at a multiplier of 1, by the DiT's name of the weight.

    Float32 (O, I). Equal to tests/golden/lora_deltas.safetensors for the LoRA files next to it.
    """
    for _, adapter in network.adapters():
        assert not (isinstance(adapter, LoRA) and adapter.magnitude), "a DoRA's depends on the weight"
    return {f"{module.name}.weight": lora.delta() for module, lora in network.adapters()}


@torch.no_grad()
def merge_into(dit: DiT, network: AdapterNetwork, multiplier: float = 1.0) -> None:
    """Makes the DiT's weights do what they and `multiplier` times the network do, in place, module by module.

    The sum is made in float32 on the weight's device and rounded once to the weight's dtype. The network is
    not attached by this, and must not be attached as well. Its own multipliers are not looked at.
    """
    for module, lora in network.adapters():
        weight_OI = dit.get_parameter(f"{module.name}.weight")
        assert weight_OI.dtype.itemsize >= 2, "a LoRA on an fp8 weight is applied live"
        weight_OI.copy_(lora.merged(weight_OI, multiplier))


class MergingPlacement(WeightPlacement):
    """Merges networks into a DiT's weights while it is loaded, tensor by tensor, before another placement.

    `networks` are pairs of a network and its multiplier, merged in their order. What the inner placement gets
    is float32 where it makes its own dtype of it, so that a weight is rounded (or quantised) once.
    """

    def __init__(self, inner: WeightPlacement, networks: Sequence[tuple[AdapterNetwork, float]]) -> None:
        super().__init__(inner.device, inner.dtype)
        self.inner = inner
        self._merges: dict[str, list[tuple[Adapter, float]]] = {}
        for network, multiplier in networks:
            for module, lora in network.adapters():
                self._merges.setdefault(f"{module.name}.weight", []).append((lora, multiplier))

    def read_on(self, name: str) -> torch.device:
        return self.inner.read_on(name)

    def put(self, model: nn.Module, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
        if name not in self._merges:
            self.inner.put(model, name, tensor, scale)
            return
        if tensor.dtype == torch.float8_e4m3fn:  # a weight that a LoRA was merged into is no longer fp8
            tensor = unscale(tensor, scale, torch.float32)
        merged = tensor
        for lora, multiplier in self._merges[name]:
            merged = lora.merged(merged, multiplier, base_OI=tensor)
        if self.inner.dtype is None:
            merged = merged.to(tensor.dtype)
        self.inner.put(model, name, merged)


MERGED_KEY = "hyimg_merged_loras"
"""The metadata key under which a merged file tells its LoRAs, as JSON."""

Merges = Sequence[tuple[Adapter, float]]


def refuse_merging_into_fp8(dit: OpenedModel[DiTArch], option: str, hint: str) -> None:
    """Raises HyimgError, naming the option, for an fp8 DiT file, whose steps are coarser than most updates."""
    if dit.quantization is not None:
        raise HyimgError(
            f"{option} cannot be used with `{dit.path}`, which is fp8 ({dit.quantization}): fp8 weights are too "
            "coarse for what a LoRA adds to them",
            hint=hint,
        )


def save_merged(
    dit: Path,
    path: Path,
    networks: Sequence[tuple[AdapterNetwork, float]],
    records: Sequence[Mapping[str, object]],
    report: Reporter,
) -> None:
    """Writes `dit`, a file or a sharded folder, as one file with networks merged at their multipliers, in order.

    `records` tell of the networks in the metadata. The file appears whole or not at all; raises as `atomic_path`.
    """
    opened = open_dit(dit, mmap=False)
    checkpoint, key_map = opened.checkpoint, opened.key_map
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
                _Chunks(header, name, merged.get(unwrapped(name)), task),
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
