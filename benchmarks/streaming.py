"""Streamed blocks of the full 2.1 model on a simulated link: how well copies hide behind computation.

The real scheduler drives a copy engine whose clock is virtual: computation and copies each take their lane, and
wait for each other only where the scheduler says so. So the figures hold for the scheduler, at the speeds that
each row names, and not for any machine. A step is the forward pass and, under checkpointing, the way back: each
block recomputed, then differentiated, from the last to the first. Operations and bytes are those of the true
geometry at 2048x2048 and batch 1, without text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.figures import Figure, Options, apart
from hyimg.checkpoints.architecture import DIT_2_1, DiTArch
from hyimg.checkpoints.names import linear_modules

BLOCKS_TO_SWAP = (9, 18, 32, 37)
TOKENS = 4096


@dataclass(frozen=True)
class Machine:
    """A link in bytes a second, and what computation achieves in operations a second."""

    link: float
    compute: float

    @property
    def name(self) -> str:
        return f"{self.link / 1e9:.0f} GB/s, {self.compute / 1e12:.0f} TFLOP/s"


# A PCIe 4 and a PCIe 5 slot of 16 lanes, each beside a card that suits it, and one that outruns its link
MACHINES = (Machine(25e9, 80e12), Machine(50e9, 400e12), Machine(25e9, 400e12))


class VirtualEngine:
    """A copy engine whose copies and computation take virtual seconds. The host is never waited for."""

    def __init__(self, copy_seconds: Sequence[float], num_slots: int) -> None:
        self.copy_seconds = copy_seconds
        self.now = 0.0
        """When the computation that is enqueued so far is done."""
        self.lane = 0.0
        """When the copies that are enqueued so far are done."""
        self.copying = 0.0
        self._used = [0.0] * num_slots
        self._arrival = [0.0] * num_slots

    def copy(self, slot: int, unit: int) -> None:
        self.lane = max(self.lane, self._used[slot]) + self.copy_seconds[unit]
        self.copying += self.copy_seconds[unit]
        self._arrival[slot] = self.lane

    def wait_for_arrival(self, slot: int) -> None:
        self.now = max(self.now, self._arrival[slot])

    def mark_used(self, slot: int) -> None:
        self._used[slot] = self.now

    def compute(self, seconds: float) -> None:
        self.now += seconds


def measure(options: Options) -> Iterator[Figure]:
    """One figure for each machine, precision and number of streamed blocks."""
    yield from figures(MACHINES[:1]) if options.toy else apart(figures, MACHINES)


def figures(machines: Sequence[Machine]) -> list[Figure]:
    """The simulated steps on each machine."""
    return [
        _figure(machine, fp8, blocks_to_swap)
        for machine in machines
        for fp8 in (False, True)
        for blocks_to_swap in BLOCKS_TO_SWAP
    ]


def _figure(machine: Machine, fp8: bool, blocks_to_swap: int) -> Figure:
    total, computing, copying = simulate(DIT_2_1, machine, blocks_to_swap, fp8=fp8)
    bound = max(computing, copying)
    three_slots = simulate(DIT_2_1, machine, blocks_to_swap, fp8=fp8, num_slots=3)[0] / bound
    return Figure(
        f"{machine.name}, {'fp8' if fp8 else 'bf16'}, {blocks_to_swap} streamed",
        total,
        beside=f"{total / bound:.3f} of the larger of computing {computing:.2f} s and copying {copying:.2f} s, "
        f"{total / (computing + copying):.2f} of their sum; link {copying / total:.0%} busy; "
        f"with three buffers {three_slots:.3f}",
        values={
            "link": machine.link,
            "compute": machine.compute,
            "fp8": fp8,
            "blocks_to_swap": blocks_to_swap,
            "computing": computing,
            "copying": copying,
            "of_larger": total / bound,
            "of_larger_with_three_slots": three_slots,
            "of_sum": total / (computing + copying),
        },
    )


def simulate(
    arch: DiTArch,
    machine: Machine,
    blocks_to_swap: int,
    *,
    fp8: bool,
    num_slots: int | None = None,
    num_steps: int = 4,
) -> tuple[float, float, float]:
    """Virtual seconds of a training step: in all, of computation alone, and of copies alone; means of the steps.

    Several, since a step begins with what the one before has left in the ring. `num_slots` None is the ring that
    training has.
    """
    from hyimg.memory.streaming import Phase, Streamer
    from hyimg.memory.swap import NUM_SLOTS, streamed_units

    num_slots = num_slots or NUM_SLOTS
    plan = streamed_units(arch, blocks_to_swap)
    unit_of = {block: number for number, blocks in enumerate(plan) for block in blocks}
    byte_of, operations_of = block_bytes(arch, fp8=fp8), block_operations(arch, TOKENS)
    copies = [sum(byte_of[block] for block in blocks) / machine.link for blocks in plan]
    engine = VirtualEngine(copies, num_slots)
    streamer = Streamer(len(plan), num_slots, engine)
    computing = 0.0

    def run(block: str, phase: Phase, passes: int) -> None:
        nonlocal computing
        if block in unit_of:
            streamer.acquire(unit_of[block], phase)
        seconds = passes * operations_of[block] / machine.compute
        engine.compute(seconds)
        computing += seconds

    for _ in range(num_steps):
        for block in operations_of:
            run(block, Phase.FORWARD_WITH_GRADIENT, 1)
        for block in reversed(operations_of):
            run(block, Phase.BACKWARD, 2)
    return engine.now / num_steps, computing / num_steps, engine.copying / num_steps


def block_bytes(arch: DiTArch, *, fp8: bool) -> dict[str, float]:
    """Bytes of each block's Linear weights, in forward order; fp8 with a float32 scale for 64 values."""
    value = 1 + 4 / 64 if fp8 else 2
    blocks: dict[str, float] = {}
    for module in linear_modules(arch):
        block = ".".join(module.name.split(".")[:2])
        blocks[block] = blocks.get(block, 0.0) + module.in_features * module.out_features * value
    return blocks


def block_operations(arch: DiTArch, num_image: int, num_text: int = 0) -> dict[str, float]:
    """Floating-point operations of each block's forward pass, batch 1: its products and its attention.

    Modulation works on one vector and does not count.
    """
    blocks: dict[str, float] = {}
    for module in linear_modules(arch):
        block, kind = ".".join(module.name.split(".")[:2]), module.name.split(".")[2]
        tokens = num_image + num_text
        if kind.endswith("mod") or kind == "modulation":
            tokens = 0
        elif block.startswith("double"):
            tokens = num_text if kind.startswith("txt") else num_image
        blocks[block] = blocks.get(block, 0.0) + 2.0 * module.in_features * module.out_features * tokens
    attention = 4.0 * (num_image + num_text) ** 2 * arch.hidden
    return {block: operations + attention for block, operations in blocks.items()}
