"""Samples of unequal length: one after another, or stacked with zeros behind the shorter ones.

Shapes: B batch, T tokens of the longest, P tokens of all samples
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(x_BT: Tensor, lengths: Sequence[int]) -> Tensor:
    """The real tokens of all samples (B, T, ...), one after another: (P, ...)."""
    return torch.cat([x_T[:length] for x_T, length in zip(x_BT.unbind(), lengths, strict=True)])


def unpack(x_P: Tensor, lengths: Sequence[int]) -> Tensor:
    """The samples again: (B, T, ...)."""
    return stack_padded(torch.split(x_P, list(lengths)))


def stack_padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows (t, ...) of different lengths as one tensor (B, T, ...).

    As `torch.nn.utils.rnn.pad_sequence`, whose backward pass copies the whole gradient once for each row.
    """
    longest = max(map(len, rows))
    parts = []
    for row in rows:
        parts.append(row)
        if len(row) < longest:
            parts.append(row.new_zeros(longest - len(row), *row.shape[1:]))
    return torch.cat(parts).view(len(rows), longest, *rows[0].shape[1:])
