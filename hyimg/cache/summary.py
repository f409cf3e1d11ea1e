"""What a caching stage has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheSummary:
    """How many entries were made now, and how many were there already."""

    num_made: int
    num_kept: int
