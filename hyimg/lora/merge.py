"""LoRA merged into the base weights: the same function as the live adapter, at no cost per step.

Shapes: I input features, O output features
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hyimg.lora.adapter import LoRA
from hyimg.lora.base import Adapter
from hyimg.lora.network import LoRANetwork
from hyimg.model.dit import DiT
from hyimg.model.loading import Placement, unscale


def delta(network: LoRANetwork) -> Mapping[str, Tensor]:
    """What a network of plain LoRAs adds to each weight at a multiplier of 1, by the DiT's name of the weight.

    Float32 (O, I). Equal to tests/golden/lora_deltas.safetensors for the LoRA files beside it.
    """
    for _, adapter in network.adapters():
        assert not (isinstance(adapter, LoRA) and adapter.magnitude), "a DoRA's depends on the weight"
    return {f"{module.name}.weight": lora.delta() for module, lora in network.adapters()}


@torch.no_grad()
def merge_into(dit: DiT, network: LoRANetwork, multiplier: float = 1.0) -> None:
    """Makes the DiT's weights do what they and `multiplier` times the network do, in place, module by module.

    The sum is made in float32 on the weight's device and rounded once to the weight's dtype. The network is
    not attached by this, and must not be attached as well. Its own multipliers are not looked at.
    """
    for module, lora in network.adapters():
        weight_OI = dit.get_parameter(f"{module.name}.weight")
        assert weight_OI.dtype.itemsize >= 2, "beside an fp8 weight a LoRA acts live"
        weight_OI.copy_(lora.merged(weight_OI, multiplier))


class MergingPlacement(Placement):
    """Merges networks into a DiT's weights while it is loaded, tensor by tensor, before another placement.

    `networks` are pairs of a network and its multiplier, merged in their order. What the inner placement gets
    is float32 where it makes its own dtype of it, so that a weight is rounded (or quantised) once.
    """

    def __init__(self, inner: Placement, networks: Sequence[tuple[LoRANetwork, float]]) -> None:
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
