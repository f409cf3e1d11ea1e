"""Max-norm regularisation (`--scale_weight_norms`): no module's update may grow beyond a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyimg.lora.network import LoRANetwork


@dataclass(frozen=True)
class NormReport:
    """What `limit_norms` found and did: norms of alpha/rank * up @ down after it, over the modules."""

    num_scaled: int
    mean: float
    largest: float

    def metrics(self) -> dict[str, float]:
        """Under the reference tool's names."""
        return {
            "max_norm/keys_scaled": self.num_scaled,
            "max_norm/max_key_norm": self.largest,
            "norm/avg_key_norm": self.mean,
        }


@torch.no_grad()
def limit_norms(network: LoRANetwork, max_norm: float) -> NormReport:
    """Scales every update whose Frobenius norm is above `max_norm` down to it, half in down and half in up.

    Modules with the learning rate 0 stay as they are. As the reference tool's, and the device is waited for once.
    """
    adapters = [lora for module, lora in network.adapters() if module.learning_rate != 0]
    norms = torch.stack([lora.update_norm() for lora in adapters]).tolist()
    num_scaled = 0
    for number, (lora, norm) in enumerate(zip(adapters, norms, strict=True)):
        if norm > max_norm:
            lora.shrink(max_norm / norm)
            norms[number] = max_norm
            num_scaled += 1
    return NormReport(num_scaled, sum(norms) / len(norms), max(norms))
