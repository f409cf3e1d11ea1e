"""Randomness by key: every draw is a function of what it is for, never of a generator's history.

That is what makes a killed and resumed run end in the same bits, and two processes equal one (DESIGN,
"Randomness"). Draws are made on the CPU always, because device generators differ from one another.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(*key: object) -> int:
    """A 63-bit seed for a key such as `(seed, epoch, sample, "noise")`.

    The parts are joined by their text, so 1 and "1" are one key. Stable over platforms and releases.
    """
    text = "|".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(*key: object) -> torch.Generator:
    """A fresh CPU generator for a key.

    A draw of fewer than 16 numbers is not the prefix of a longer one in torch, so draw each quantity in
    one call of one size.
    """
    import torch

    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_random(*key: object) -> random.Random:
    """Python's generator for a key: for orders and choices that need no torch."""
    return random.Random(keyed_seed(*key))
