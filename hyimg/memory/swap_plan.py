"""`--blocks_to_swap N`: which blocks live in host memory. No torch.

The reference tool's split: N//2 double blocks and 2*(N - N//2) single blocks. Two neighbouring single blocks
are nearly as large as one double block, so they stream as one unit: N units of about one size, and a ring of
equal buffers wastes little.
"""

from __future__ import annotations

from dataclasses import dataclass

from hyimg.errors import HyimgError
from hyimg.model.architecture import DiTArch

# The reference tool leaves so many blocks of each kind on the device
_RESIDENT = 2


@dataclass(frozen=True)
class SwapPlan:
    """The units that are streamed, in the order of the forward pass; each names its blocks as the model does
    (`double_blocks.3`, or `single_blocks.8` and `single_blocks.9`)."""

    units: tuple[tuple[str, ...], ...]

    @staticmethod
    def for_arch(arch: DiTArch, blocks_to_swap: int) -> SwapPlan:
        """The units of `--blocks_to_swap`, spread evenly over the depth.

        Evenly, so that the blocks between two units, which are on the device, give the next copy time. Raises
        HyimgError beyond the limit.
        """
        check_blocks_to_swap(arch, blocks_to_swap)
        num_doubles = blocks_to_swap // 2
        num_pairs = blocks_to_swap - num_doubles
        doubles = [(f"double_blocks.{i}",) for i in _spread(num_doubles, arch.num_double)]
        starts = [2 * i for i in _spread(num_pairs, arch.num_single // 2)]
        pairs = [(f"single_blocks.{i}", f"single_blocks.{i + 1}") for i in starts]
        return SwapPlan((*doubles, *pairs))

    @property
    def blocks(self) -> frozenset[str]:
        """The names of all streamed blocks."""
        return frozenset(block for unit in self.units for block in unit)


def max_blocks_to_swap(arch: DiTArch) -> int:
    """The largest N whose double and single blocks each leave two on the device: 37 for 2.1."""
    most_doubles = arch.num_double - _RESIDENT
    most_pairs = (arch.num_single - _RESIDENT) // 2
    # N//2 doubles bound N from above by 2 * most_doubles + 1, N - N//2 pairs by 2 * most_pairs
    return max(0, min(2 * most_doubles + 1, 2 * most_pairs))


def check_blocks_to_swap(arch: DiTArch, blocks_to_swap: int) -> None:
    """Raises HyimgError for more than the model's depths allow."""
    most = max_blocks_to_swap(arch)
    if blocks_to_swap > most:
        raise HyimgError(
            f"`--blocks_to_swap` {blocks_to_swap} is more than this model's {most}: of its {arch.num_double} "
            f"double and {arch.num_single} single blocks two of each stay on the device",
            hint=f"give at most {most}",
        )


def _spread(count: int, places: int) -> list[int]:
    """`count` of the numbers 0 .. places-1, evenly apart and the last one free where there is room."""
    return [i * places // count for i in range(count)]
