"""The scheduler of streamed weights against a simulated engine with a clock, and the split of the blocks."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from hyimg.checkpoints.architecture import DIT_2_1, DIT_TINY, DIT_TINY_FULL
from hyimg.errors import HyimgError
from hyimg.memory.streaming import Phase, Streamer, upcoming
from hyimg.memory.swap import max_blocks_to_swap, streamed_units

FORWARD, WITH_GRADIENT, BACKWARD = Phase.FORWARD, Phase.FORWARD_WITH_GRADIENT, Phase.BACKWARD


class SimulatedEngine:
    """A device with a lane that computes and a lane that copies; the host enqueues ahead of both, in no time.

    Knows the truth about every slot, and fails where a copy or a computation comes at a wrong time.
    """

    def __init__(self, num_slots: int, copy_seconds) -> None:
        self.copy_seconds = copy_seconds  # of a unit
        self.compute_clock = self.copy_clock = 0.0
        self.contents: list[int | None] = [None] * num_slots
        self.arrival = [0.0] * num_slots  # when the last copy into a slot is done
        self.may_refill = [0.0] * num_slots  # what the scheduler has told: after this time
        self.in_use_until = [0.0] * num_slots  # what is true
        self.copies: list[int] = []

    def copy(self, slot: int, unit: int) -> None:
        start = max(self.copy_clock, self.may_refill[slot])
        assert start >= self.in_use_until[slot], "a slot is filled while a computation still reads it"
        self.copy_clock = self.arrival[slot] = start + self.copy_seconds(unit)
        self.contents[slot] = unit
        self.copies.append(unit)

    def wait_for_arrival(self, slot: int) -> None:
        self.compute_clock = max(self.compute_clock, self.arrival[slot])

    def mark_used(self, slot: int) -> None:
        self.may_refill[slot] = self.compute_clock

    def compute(self, slot: int | None, unit: int, seconds: float) -> None:
        """A block of `unit` runs with the weights in `slot`; None is a block that is resident."""
        if slot is not None:
            assert self.contents[slot] == unit, "a computation reads another unit's weights"
            assert self.compute_clock >= self.arrival[slot], (
                "a computation reads weights before they are there"
            )
        self.compute_clock += seconds
        if slot is not None:
            self.in_use_until[slot] = self.compute_clock

    @property
    def seconds(self) -> float:
        return max(self.compute_clock, self.copy_clock)


def simulate(num_units=10, num_slots=2, copy=1.0, compute=1.0):
    """(a function that runs one unit in a phase, the engine)."""
    engine = SimulatedEngine(num_slots, copy if callable(copy) else lambda unit: copy)
    streamer = Streamer(num_units, num_slots, engine)

    def run(unit, phase):
        engine.compute(streamer.acquire(unit, phase), unit, compute)

    return run, engine


def train_step(run, num_units):
    for unit in range(num_units):
        run(unit, WITH_GRADIENT)
    for unit in reversed(range(num_units)):
        run(unit, BACKWARD)


def test_a_forward_pass_copies_each_unit_once_in_order_and_then_the_first_ones_again():
    run, engine = simulate(num_units=5)
    for _ in range(2):
        for unit in range(5):
            run(unit, FORWARD)
    # what was fetched for a third pass is there when it comes
    assert engine.copies == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_a_training_step_turns_round_without_copying_the_last_units_again():
    run, engine = simulate(num_units=5)
    train_step(run, 5)
    assert engine.copies == [0, 1, 2, 3, 4, 2, 1, 0], "3 and 4 are still there on the way back"
    engine.copies.clear()
    train_step(run, 5)
    assert engine.copies == [2, 3, 4, 2, 1, 0], "and 0 and 1 at the next step"


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize(("copy", "compute"), [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (1.0, 0.1)])
def test_copies_and_computation_overlap(copy, compute, num_slots):
    run, engine = simulate(num_units=20, num_slots=num_slots, copy=copy, compute=compute)
    steps = 3
    for _ in range(steps):
        train_step(run, 20)
    longer = 40 * steps * max(copy, compute)
    # the first copy has nothing to hide behind, nor has the last computation
    assert engine.seconds <= longer + copy + compute
    assert engine.seconds < 40 * steps * (copy + compute)


def test_resident_blocks_hide_a_copy_that_is_longer_than_a_streamed_block():
    engine = SimulatedEngine(2, lambda unit: 4.0)
    streamer = Streamer(6, 2, engine)
    for _ in range(3):
        for unit in range(6):
            engine.compute(streamer.acquire(unit, FORWARD), unit, 1.0)
            for _ in range(3):
                engine.compute(None, unit, 1.0)
    assert engine.compute_clock <= 3 * 6 * 4.0 + 4.0, "after the first copy the computation never waits"


def test_one_slot_works_without_overlap():
    run, engine = simulate(num_units=4, num_slots=1)
    train_step(run, 4)
    assert engine.seconds == 7 + 8, "seven copies, since the turn needs none, and eight computations"


def test_units_that_all_fit_into_the_ring_are_copied_once():
    run, engine = simulate(num_units=3, num_slots=8)
    for _ in range(3):
        train_step(run, 3)
    assert sorted(engine.copies) == [0, 1, 2]


def test_a_second_forward_pass_without_a_backward_pass_works():
    run, _ = simulate(num_units=6)
    for unit in range(6):
        run(unit, WITH_GRADIENT)
    for unit in range(6):  # a sample in the middle of a step
        run(unit, FORWARD)
    for unit in reversed(range(6)):
        run(unit, BACKWARD)


def test_the_scheduler_recovers_from_a_pass_that_stops_early():
    run, _ = simulate(num_units=6)
    for unit in range(3):
        run(unit, WITH_GRADIENT)
    train_step(run, 6)
    run(5, BACKWARD)
    train_step(run, 6)


def test_after_a_failed_copy_the_slot_counts_as_empty():
    run, engine = simulate(num_units=6)
    run(0, FORWARD)
    plain = engine.copy

    def failing(slot, unit):
        engine.contents[slot] = None  # half of it is overwritten
        raise MemoryError

    engine.copy = failing
    with pytest.raises(MemoryError):
        run(3, FORWARD)
    engine.copy = plain
    for unit in (0, 1, 3, 2, 4, 5):
        run(unit, FORWARD)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_gives_the_right_units(seed):
    draw = random.Random(seed)
    num_units, num_slots = draw.randint(1, 8), draw.randint(1, 5)
    seconds = [draw.random() * 3 for _ in range(num_units)]
    engine = SimulatedEngine(num_slots, seconds.__getitem__)
    streamer = Streamer(num_units, num_slots, engine)
    for _ in range(300):
        unit, phase = draw.randrange(num_units), draw.choice(list(Phase))
        slot = streamer.acquire(unit, phase)
        for _ in range(draw.randint(0, 2)):
            engine.compute(slot, unit, draw.random() * 2)
            assert streamer.acquire(unit, phase) == slot, "asking again changes nothing"
        engine.compute(None, unit, draw.random())


@pytest.mark.parametrize(
    ("unit", "phase", "expected"),
    [
        (1, FORWARD, [2, 3, 0]),
        (3, FORWARD, [0, 1, 2]),
        (1, WITH_GRADIENT, [2, 3, 0]),
        (2, WITH_GRADIENT, [3, 1, 0]),
        (3, WITH_GRADIENT, [2, 1, 0]),
        (2, BACKWARD, [1, 0, 3]),
        (0, BACKWARD, [1, 2, 3]),
    ],
)
def test_upcoming_units(unit, phase, expected):
    assert list(upcoming(unit, phase, 4)) == expected


# ---- which blocks


@pytest.mark.parametrize("blocks_to_swap", range(38))
def test_units_follow_the_references_split_and_are_spread_evenly(blocks_to_swap):
    units = streamed_units(DIT_2_1, blocks_to_swap)
    assert len(units) == blocks_to_swap
    names = [name for unit in units for name in unit]
    doubles = [int(name.split(".")[1]) for name in names if name.startswith("double")]
    singles = [int(name.split(".")[1]) for name in names if name.startswith("single")]
    assert len(doubles) == blocks_to_swap // 2
    assert len(singles) == 2 * (blocks_to_swap - blocks_to_swap // 2)
    assert names == [f"double_blocks.{i}" for i in doubles] + [f"single_blocks.{i}" for i in singles]
    for numbers, depth, step in ((doubles, 20, 1), (singles[::2], 40, 2)):
        assert numbers == sorted(set(numbers))
        assert not numbers or numbers[-1] < depth
        gaps = {second - first for first, second in pairwise(numbers)}
        assert not gaps or max(gaps) - min(gaps) <= step, "even"


def test_the_limit_follows_from_the_depths():
    assert [max_blocks_to_swap(arch) for arch in (DIT_2_1, DIT_TINY_FULL, DIT_TINY)] == [37, 37, 1]
    with pytest.raises(HyimgError, match="`--blocks_to_swap` 38 is more than this model's 37"):
        streamed_units(DIT_2_1, 38)
