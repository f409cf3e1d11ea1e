"""Dropout of adapters by key: what is dropped is a function of (seed, step, micro-batch, module).

Three kinds, where the reference tool has them (its networks/lora_flux.py):

    dropout   each value of down(x) is 0 with probability p, and 1/(1-p) times itself else
    rank      each rank of each image is left out with probability p; what is left counts 1/(1-p) times
    module    the whole adapter is left out of the batch with probability p, and nothing makes up for it

Because a mask follows from its key, gradient checkpointing's second forward pass meets the same one, and a
resumed run the ones that it would have met. Masks are drawn on the CPU, since devices draw differently.

Shapes: B images, P tokens of all images, R rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hyimg.randomness import keyed_generator, keyed_random

Key = tuple[object, ...]


@dataclass(frozen=True)
class DropoutRates:
    """The probabilities of the three kinds, each at least 0 and below 1."""

    dropout: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.dropout or self.rank or self.module)


@dataclass
class Dropout:
    """The dropout of the adapter of one module. It is off while `key` is None."""

    rates: DropoutRates
    module: str
    key: Key | None = None
    num_images: int = 1

    @property
    def is_on(self) -> bool:
        return self.key is not None

    def drops_module(self) -> bool:
        """Whether the whole adapter is left out under this key."""
        assert self.key is not None
        draw = keyed_random(*self.key, self.module, "module dropout").random()
        return draw < self.rates.module

    def __call__(self, hidden: Tensor, part: int = 0) -> Tensor:
        """Drops values and ranks of down(x), (P, R), whose rows are those of one image after another.

        `part` tells apart the adapters of a split module.
        """
        assert self.key is not None
        if p := self.rates.dropout:
            hidden = hidden * self._mask(hidden, tuple(hidden.shape), p, "dropout", part)
        if p := self.rates.rank:
            shape = (self.num_images, 1, hidden.shape[-1])
            mask_B1R = self._mask(hidden, shape, p, "rank dropout", part)
            hidden = (hidden.view(self.num_images, -1, hidden.shape[-1]) * mask_B1R).flatten(0, 1)
        return hidden

    def _mask(self, like: Tensor, shape: tuple[int, ...], p: float, kind: str, part: int) -> Tensor:
        """0 where something is dropped, 1/(1-p) elsewhere."""
        assert self.key is not None
        generator = keyed_generator(*self.key, self.module, kind, part)
        return _kept(shape, p, generator).to(like.device).to(like.dtype) / (1 - p)


def _kept(shape: tuple[int, ...], p: float, generator: torch.Generator) -> Tensor:
    """True with probability 1-p, to 1/65536: four draws from each 64-bit word, 4 times as fast as bernoulli_."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    return (words.view(torch.int16)[:count] >= threshold).view(shape)
