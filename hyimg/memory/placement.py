"""Where the DiT's tensors go while it is loaded: the device, or host memory, and in fp8 if that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyimg.memory.fp8 import E4M3, is_quantised, put_scaled, quantize
from hyimg.memory.fp8_report import QuantizationErrors
from hyimg.memory.swap_plan import SwapPlan
from hyimg.model.loading import Placement

_HOST = torch.device("cpu")


class DiTPlacement(Placement):
    """Puts weights of streamed blocks into host memory and all else onto the device, one tensor at a time.

    With `fp8` the blocks' weights are quantised as they come, on the device where that is a GPU, so that the
    model is never there in full precision. Weights that are e4m3 in the file stay so. `errors` are what
    quantising has cost.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, plan: SwapPlan, fp8: bool = False
    ) -> None:
        super().__init__(device, dtype)
        self.compute_dtype = dtype
        self.fp8 = fp8
        self.errors = QuantizationErrors()
        self._streamed_blocks = plan.blocks

    def read_on(self, name: str) -> torch.device:
        is_for_device = self.fp8 and is_quantised(name)
        return self.device if is_for_device else self._home(name)

    def put(self, model: nn.Module, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
        home = self._home(name)
        if tensor.dtype == E4M3 and is_quantised(name):
            put_scaled(model, name, tensor.to(home), (torch.ones(1) if scale is None else scale).to(home))
        elif self.fp8 and is_quantised(name):
            weight_OI = tensor.to(self.compute_dtype)
            q_OI, scale = quantize(weight_OI)
            self.errors.add(name, weight_OI, q_OI, scale)
            put_scaled(model, name, q_OI.to(home), scale.to(home))
        else:
            Placement(home, self.compute_dtype).put(model, name, tensor, scale)

    def _home(self, name: str) -> torch.device:
        """A streamed weight is at home on the host."""
        block = ".".join(name.split(".", 2)[:2])
        is_streamed = block in self._streamed_blocks and is_quantised(name)
        return _HOST if is_streamed else self.device
