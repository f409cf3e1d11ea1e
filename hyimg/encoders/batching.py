"""Batches of rows of equal length, so that no row is padded. No torch."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from itertools import groupby


def equal_length_batches(rows: Sequence[Sized], batch_size: int) -> list[list[int]]:
    """Indices of `rows` in batches of at most `batch_size` rows of one length.

    The longest come first, so that memory which does not suffice shows at once; within a length, rows keep
    their order.
    """

    def length(index: int) -> int:
        return len(rows[index])

    order = sorted(range(len(rows)), key=length, reverse=True)
    groups = (list(group) for _, group in groupby(order, key=length))
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
