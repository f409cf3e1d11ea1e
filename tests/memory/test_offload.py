"""Offloading against a simulated lane: order, overlap, lifetimes, and what becomes of buffers."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyimg.memory.checkpointing import HostPool, Offloader, SynchronousLane

NUM_BLOCKS = 12
FORWARD_SECONDS, BACKWARD_SECONDS = 1.0, 3.0


class Ticket:
    """A copy under way: when it ends on the clock, and its tensors, which somebody else has to keep alive."""

    def __init__(self, destination: Tensor, source: Tensor, end: float) -> None:
        self.end = end
        self.done = False
        self._tensors = [weakref.ref(destination), weakref.ref(source)]

    def finish(self) -> None:
        if not self.done:
            destination, source = (reference() for reference in self._tensors)
            assert destination is not None, "the destination was freed before the copy was done"
            assert source is not None, "the source was freed before the copy was done"
            destination.copy_(source)
            self.done = True


class SimulatedLane:
    """Copies that take time on a lane of their own, beside a computation that takes time on its own.

    A destination holds NaN until the computation has waited for it.
    """

    def __init__(self, copy_seconds: float) -> None:
        self.copy_seconds = copy_seconds
        self.now = 0.0  # of the computation
        self.free_at = 0.0  # of the lane
        self.under_way: list[Ticket] = []
        self.num_copies = {"to host": 0, "to device": 0}
        self.allocated: list[int] = []
        self.freed = 0

    def compute(self, seconds: float) -> None:
        self.now += seconds

    def allocate(self, num_bytes: int) -> Tensor:
        self.allocated.append(num_bytes)
        # Every byte of a NaN, as what was there before
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def copy(self, destination: Tensor, source: Tensor) -> Ticket:
        to_host = destination._base is not None
        self.num_copies["to host" if to_host else "to device"] += 1
        destination.fill_(torch.nan)
        self.free_at = max(self.free_at, self.now) + self.copy_seconds
        # The lane runs its copies in order: this one reads and writes what the earlier ones have left
        for earlier in self.under_way:
            earlier.finish()
        ticket = Ticket(destination, source, self.free_at)
        self.under_way = [ticket]
        return ticket

    def wait(self, ticket: Ticket) -> None:
        self.now = max(self.now, ticket.end)
        ticket.finish()

    def free(self, buffer: Tensor) -> None:
        self.freed += 1
        self.now = max(self.now, self.free_at)
        for ticket in self.under_way:
            ticket.finish()


class Scale(nn.Module):
    """A block whose backward pass needs its input, and which takes time on the lane's clock."""

    def __init__(self, lane: SimulatedLane | None) -> None:
        super().__init__()
        self.lane = lane
        self.weight = nn.Parameter(torch.tensor(1.1))

    def forward(self, x_BLD: Tensor, vec_BD: Tensor) -> Tensor:
        if self.lane:
            self.lane.compute(FORWARD_SECONDS)
            if torch._C._current_graph_task_id() != -1:
                self.lane.compute(BACKWARD_SECONDS - FORWARD_SECONDS)
        assert torch.isfinite(x_BLD).all(), "used before it came"
        return (x_BLD * self.weight).tanh() * vec_BD[:, None]


class Model:
    def __init__(self, copy_seconds: float = 0.1, *, offload: bool = True) -> None:
        self.lane = SimulatedLane(copy_seconds)
        self.offloader = Offloader(self.lane)
        self.offload = offload
        self.blocks = [Scale(self.lane) for _ in range(NUM_BLOCKS)]

    @contextmanager
    def _inputs(self) -> Iterator[None]:
        if self.offload:
            with self.offloader.inputs():
                yield
        else:
            yield

    def forward(self, num_tokens: int = 5, seed: int = 0, *, interrupt: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x_BLD = torch.randn(1, num_tokens, 8, generator=generator)
        vec_BD = torch.randn(1, 8, generator=generator)
        for i, block in enumerate(self.blocks):
            if i == interrupt:
                raise KeyboardInterrupt
            with self._inputs():
                x_BLD = checkpoint(block, x_BLD, vec_BD, use_reentrant=False)
        return x_BLD.sum()

    def gradients(self) -> list[Tensor]:
        gradients = [block.weight.grad for block in self.blocks]
        for block in self.blocks:
            block.weight.grad = None
        return gradients


def seconds_of_a_step(copy_seconds: float) -> float:
    model = Model(copy_seconds)
    model.forward().backward()
    return model.lane.now


def test_fast_copies_are_hidden_by_computation() -> None:
    computation = NUM_BLOCKS * (FORWARD_SECONDS + BACKWARD_SECONDS)
    assert seconds_of_a_step(0.0) == computation
    # Nearly as long as a block; nothing is copied back for the last blocks, whose inputs are still there
    assert seconds_of_a_step(0.95) == pytest.approx(computation)


def test_slow_copies_take_only_their_own_time() -> None:
    copies = 4.0
    total = seconds_of_a_step(copies)
    to_host = NUM_BLOCKS * copies
    back = (NUM_BLOCKS - 2) * copies
    bound = to_host + back + 2 * (FORWARD_SECONDS + BACKWARD_SECONDS)
    assert to_host + back <= total <= bound
    assert total < to_host + back + NUM_BLOCKS * (FORWARD_SECONDS + BACKWARD_SECONDS) - 20


def test_the_last_inputs_stay_on_the_device() -> None:
    model = Model()
    model.forward().backward()
    assert model.lane.num_copies["to host"] == NUM_BLOCKS
    assert model.lane.num_copies["to device"] == NUM_BLOCKS - 2


def test_each_of_a_blocks_inputs_is_copied_back_once_per_backward_pass() -> None:
    lane = SimulatedLane(0.1)
    offloader = Offloader(lane)
    image_BLD = torch.ones(1, 5, 8, requires_grad=True)
    text_BLD = torch.ones(1, 3, 8, requires_grad=True)
    for _ in range(NUM_BLOCKS):
        with offloader.inputs():
            image_BLD, text_BLD = checkpoint(
                lambda a, b: (a * b.mean(), b * a.mean()), image_BLD, text_BLD, use_reentrant=False
            )
    loss = image_BLD.sum() + text_BLD.sum()
    for num_passes in (1, 2):
        loss.backward(retain_graph=True)
        again = 0 if num_passes == 1 else 2 * NUM_BLOCKS  # the second finds none on the device
        assert lane.num_copies["to device"] == 2 * (NUM_BLOCKS - 2) + again


def test_inputs_leave_the_device_after_two_more_blocks_have_started() -> None:
    model = Model()
    most = 0
    x_BLD, vec_BD = torch.ones(1, 5, 8), torch.ones(1, 8)
    for block in model.blocks:
        with model.offloader.inputs():
            x_BLD = checkpoint(block, x_BLD, vec_BD, use_reentrant=False)
        most = max(most, len(model.offloader._on_device))
    assert most == 2
    assert len(model.offloader._on_device) == 2


def test_host_buffers_are_reused_in_every_step() -> None:
    gc.disable()  # reference counts alone free a graph
    try:
        model = Model()
        for step in range(4):
            model.forward(seed=step).backward()
            assert len(model.lane.allocated) == NUM_BLOCKS
        assert model.offloader.pool.free_bytes == sum(model.lane.allocated)
        model.forward()  # dropped
        model.forward().backward()
        assert len(model.lane.allocated) == NUM_BLOCKS
    finally:
        gc.enable()


def test_a_longer_prompt_replaces_buffers_and_a_shorter_one_uses_larger_ones() -> None:
    model = Model()
    for num_tokens in (300, 400, 300, 390, 400):
        model.forward(num_tokens).backward()
    assert len(model.lane.allocated) == 2 * NUM_BLOCKS
    assert model.offloader.pool.free_bytes == sum(model.lane.allocated[NUM_BLOCKS:])
    assert model.lane.freed == NUM_BLOCKS


def test_small_tensors_do_not_take_large_buffers() -> None:
    """As a longer prompt's text streams beside the images'."""
    lane = SimulatedLane(0)
    pool = HostPool(lane)
    for text_bytes in (50_000, 75_000, 100_000):
        taken = [pool.take(size) for _ in range(20) for size in (1_000_000, text_bytes)]
        pool.give_back(taken)
    assert sum(len(buffer) > 900_000 for buffer in pool._free) == 20
    assert lane.freed == 40, "each time the 20 of the texts, which had become too small"


def test_a_pool_rounds_up_by_an_eighth_at_most() -> None:
    lane = SimulatedLane(0)
    pool = HostPool(lane)
    for num_bytes in (1, 5000, 1 << 20, (1 << 20) + 1, 29_360_128, 31_000_001):
        size = len(pool.take(num_bytes))
        assert num_bytes <= size <= max(num_bytes * 1.125 + 1, 512)


def test_hidden_states_are_offloaded_and_the_conditioning_is_not() -> None:
    model = Model()
    model.forward()
    assert model.lane.num_copies["to host"] == NUM_BLOCKS, "one of the two inputs of each block"


def test_offloading_preserves_values_strides_and_dtype() -> None:
    offloader = Offloader(SynchronousLane())
    for tensor in (
        torch.randn(2, 3, 4).transpose(1, 2),
        torch.randn(2, 3, 4).bfloat16(),
        torch.randn(2, 5, 4)[:, 1:4],
        torch.randn(1, 1, 1).expand(2, 3, 4),
    ):
        weight = torch.ones((), dtype=tensor.dtype, requires_grad=True)
        with offloader.inputs():
            out = tensor * weight
        saved = out.grad_fn._saved_self
        assert torch.equal(saved, tensor)
        assert saved.stride() == tensor.stride()
        assert saved.dtype == tensor.dtype


def drive(model: Model, seed: int) -> list[Tensor]:
    """Random forwards, backwards, dropped graphs and interrupts; the gradients of every backward."""
    choose = random.Random(seed)
    pending: list[Tensor] = []
    gradients: list[Tensor] = []
    for step in range(14):
        kind = choose.choice(["forward", "forward", "backward", "backward", "drop", "interrupt", "both"])
        index = choose.randrange(len(pending)) if pending else 0
        if kind == "forward":
            pending.append(model.forward(choose.choice([3, 50, 200]), seed=step))
        elif kind == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                model.forward(7, interrupt=choose.randrange(NUM_BLOCKS))
        elif kind == "both" and len(pending) > 1:
            (pending.pop() + pending.pop()).backward()
            gradients += model.gradients()
        elif kind == "backward" and pending:
            loss = pending.pop(index)
            loss.backward(retain_graph=True)
            loss.backward()
            gradients += model.gradients()
        elif kind == "drop" and pending:
            pending.pop(index)
    return gradients


@pytest.mark.parametrize("seed", range(25))
def test_any_order_of_passes_uses_tensors_only_while_they_are_on_the_device(seed: int) -> None:
    expected = drive(Model(offload=False), seed)
    for copy_seconds in (0.0, 0.7, 9.0):
        model = Model(copy_seconds)
        got = drive(model, seed)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_inputs_leave_the_device_and_gradients_are_the_same() -> None:
    device = torch.device("cuda", 0)
    shape, num_blocks = (1, 4096, 2048), 16
    gradients, held = [], []
    for offloader in (None, Offloader.for_device(device)):
        blocks = [Scale(None).to(device) for _ in range(num_blocks)]
        for _ in range(3):
            x_BLD: Any = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
            vec_BD = torch.ones(1, shape[-1], device=device)
            before = torch.cuda.memory_allocated(device)
            for block in blocks:
                if offloader:
                    with offloader.inputs():
                        x_BLD = checkpoint(block, x_BLD, vec_BD, use_reentrant=False)
                else:
                    x_BLD = checkpoint(block, x_BLD, vec_BD, use_reentrant=False)
            held.append(torch.cuda.memory_allocated(device) - before)
            x_BLD.sum().backward()
        gradients.append([block.weight.grad for block in blocks])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert held[-1] < held[0] / 4
