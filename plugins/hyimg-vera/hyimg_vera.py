"""A hyimg plugin: the network `vera`, LoRA with fixed random matrices and two trained vectors (arXiv 2310.11454)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from hyimg.hookspecs import Provided, hookimpl
from hyimg.lora.base import Adapter
from hyimg.randomness import keyed_generator


class VeRA(Adapter):
    """alpha/rank * diag(b) B diag(d) A: `vera_lambda_b` (O) and `vera_lambda_d` (R) are trained and saved.

    A (R, I) and B (O, R) depend on their shapes alone. They are Kaiming-uniform (section 3.2) and stored in no file.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"scale_weight_norms"})
    a_RI: Tensor
    b_OR: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, alpha: float, start: float = 0.1
    ) -> None:
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        self.start = start
        self.vera_lambda_b = nn.Parameter(torch.zeros(out_features))
        self.vera_lambda_d = nn.Parameter(torch.zeros(rank))
        for name, shape in (("a_RI", (rank, in_features)), ("b_OR", (out_features, rank))):
            generator = keyed_generator("vera", name, *shape)
            self.register_buffer(
                name, nn.init.kaiming_uniform_(torch.empty(shape), generator=generator), persistent=False
            )

    @torch.no_grad()
    def initialize(self, *key: object) -> None:
        """b is 0, so that a fresh adapter does nothing, and d is `start`."""
        self.vera_lambda_b.zero_()
        self.vera_lambda_d.fill_(self.start)

    def delta(self) -> Tensor:
        scaled_RI = self.vera_lambda_d.float()[:, None] * self.a_RI.float()
        return self.scale * self.vera_lambda_b.float()[:, None] * (self.b_OR.float() @ scaled_RI)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        self.vera_lambda_b.mul_(factor)


@hookimpl
def hyimg_networks() -> Provided:
    return {"vera": VeRA}
