"""Bands of noise levels: losses are told apart by them, since a loss near the image is another than near noise."""

from __future__ import annotations

NUM_BANDS = 4
BANDS = tuple((1000 * i / NUM_BANDS, 1000 * (i + 1) / NUM_BANDS) for i in range(NUM_BANDS))
"""Lower and upper timestep of each band, 0..1000."""


def band_of(timestep: float) -> int:
    """The number of the band that a timestep (0..1000) falls into."""
    return min(int(timestep * NUM_BANDS / 1000), NUM_BANDS - 1)


def band_name(band: int) -> str:
    """As metrics call it: `t0-250`."""
    low, high = BANDS[band]
    return f"t{low:g}-{high:g}"
