"""How far apart two ways of computing the same number may be: from the number format and the length of the sums.

A test compares in one of three ways:

- The same operations on the same shapes, twice: equal to the last bit.
- A reference value: the tolerance that `tests/golden/README.md` gives for it.
- The same number in another grouping (other batches, chunks, processes, merged matrices): `rounding`, times the
  magnitude of what is summed. Each processor splits a sum into other parts, so no observed difference is a bound.
"""

from __future__ import annotations

import math

import torch

CERTAINTY = 4.0
"""Allowed rounding error of a sum in standard deviations: about one sum in 16,000 has more than four."""


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest error to expect of a sum, as a share of the sum of its terms' magnitudes.

    `CERTAINTY * sqrt(terms) * u`, where `u` is half of the format's `eps` (Higham and Mary, "A new approach to
    probabilistic rounding error analysis", 2019, theorem 2.4; the worst case is `terms * u`). For a number that
    passes through several sums, `terms` is the total of their lengths.
    """
    return CERTAINTY * math.sqrt(terms) * torch.finfo(dtype).eps / 2
