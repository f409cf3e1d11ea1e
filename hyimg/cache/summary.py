"""What a caching stage has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheSummary:
    """How many entries were made now, and how many were there already.

    Of those made, `num_damaged` stand in place of damaged ones; `num_pruned` were removed.
    """

    num_made: int
    num_kept: int
    num_damaged: int = 0
    num_pruned: int = 0
