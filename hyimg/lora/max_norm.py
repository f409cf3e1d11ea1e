"""Max-norm regularisation (`--scale_weight_norms`): no module's update may grow beyond a norm.

Shapes: I input features, O output features, R rank
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    Modules with the learning rate 0 stay as they are. As the reference tool's, but for the products of
    matrices: |up @ down|^2 is the sum over R x R of (up^T up) * (down down^T), so that nothing of the
    weight's size is made, and the device is waited for once.
    """
    adapters = [lora for module, lora in network.adapters() if module.learning_rate != 0]
    norms = torch.stack([lora.scale * _product_norm(*lora.matrices()) for lora in adapters]).tolist()
    num_scaled = 0
    for number, (lora, norm) in enumerate(zip(adapters, norms, strict=True)):
        if norm > max_norm:
            lora.shrink(max_norm / norm)
            norms[number] = max_norm
            num_scaled += 1
    return NormReport(num_scaled, sum(norms) / len(norms), max(norms))


def _product_norm(down_RI: Tensor, up_OR: Tensor) -> Tensor:
    """The Frobenius norm of up @ down."""
    down_RI, up_OR = down_RI.float(), up_OR.float()
    square = ((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum()
    return torch.clamp(square, min=0).sqrt()
