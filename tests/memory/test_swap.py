"""Streaming on a real model: not a bit changes, and no weight is read before it arrived or after it went."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.config.models import TrainingMemory
from hyimg.lora.network import AdapterNetwork
from hyimg.memory.dit_loader import install_run_block
from hyimg.memory.fp8 import put_scaled, quantize
from hyimg.memory.streaming import SynchronousCopyEngine
from hyimg.memory.swap import BlockSwap, streamed_parameters, streamed_units
from hyimg.model.dit import DiT, collate
from hyimg.model.loading import init_random

ARCH = replace(DIT_TINY, num_double=5, num_single=10)
MOST = 7
CPU = torch.device("cpu")
CHECKPOINTING = {
    "plain": TrainingMemory(),
    "checkpointing": TrainingMemory(gradient_checkpointing=True),
    "keep attention": TrainingMemory(checkpoint_keep="attention"),
    "offload": TrainingMemory(cpu_offload_checkpointing=True),
    "keep and offload": TrainingMemory(checkpoint_keep="attention", cpu_offload_checkpointing=True),
}


class LateEngine(SynchronousCopyEngine):
    """As late as an engine may be: bytes arrive when they are waited for, and until then a slot is NaN."""

    def __init__(self, slots: Sequence[Tensor], units: Sequence[Tensor]) -> None:
        super().__init__(slots, units)
        self.under_way: dict[int, int] = {}
        self.copies: list[int] = []

    def copy(self, slot: int, unit: int) -> None:
        self.copies.append(unit)
        self.slots[slot].fill_(0xFF)
        self.under_way[slot] = unit

    def wait_for_arrival(self, slot: int) -> None:
        if slot in self.under_way:
            super().copy(slot, self.under_way.pop(slot))


class _Remembered:
    """Something to be found alive."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    model = DiT(ARCH)
    init_random(model, seed=0)
    return model.state_dict()


@pytest.fixture
def make(weights: dict[str, Tensor]) -> Callable[..., tuple[DiT, AdapterNetwork, BlockSwap | None]]:
    """A DiT with a LoRA that does something, run as the options say; `dtype` and `fp8` as well."""

    def call(
        blocks_to_swap: int = 0,
        checkpointing: str = "plain",
        *,
        dtype: torch.dtype = torch.float32,
        fp8: bool = False,
        make_engine: Any = LateEngine,
        num_slots: int = 2,
    ) -> tuple[DiT, AdapterNetwork, BlockSwap | None]:
        dit = DiT(ARCH)
        dit.load_state_dict(weights)
        dit.to(dtype).requires_grad_(False)
        if fp8:
            for name, tensor in list(dit.named_parameters()):
                if "_blocks" in name and name.endswith("weight") and "norm" not in name:
                    put_scaled(dit, name, *quantize(tensor.detach()))
        network = AdapterNetwork.create(dit, rank=2, seed=1)
        for _, lora in network.adapters():
            torch.nn.init.normal_(lora.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(2))
        network.attach(dit)
        units = streamed_units(ARCH, blocks_to_swap)
        swap = None
        if units:
            swap = BlockSwap(
                dit,
                units,
                CPU,
                checkpointing=CHECKPOINTING[checkpointing].checkpoints_blocks,
                make_engine=make_engine,
                num_slots=num_slots,
            )
        install_run_block(dit, CHECKPOINTING[checkpointing], swap)
        return dit, network, swap

    return call


def ask(dit: DiT, *, seed: int = 0) -> Tensor:
    """The answer for a batch of two, one of them with glyphs and both of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text = collate([(noise(5, ARCH.text_dim), noise(3, ARCH.byt5_dim)), (noise(9, ARCH.text_dim), None)])
    latent_BCHW = noise(2, ARCH.latent_channels, 3, 4)
    return dit(latent_BCHW, torch.tensor([300.0, 800.0]), text.to(dtype=dit.dtype))


def gradients(dit: DiT, network: AdapterNetwork) -> list[Tensor]:
    """The loss of a batch and the adapters' gradients."""
    network.zero_grad()
    loss = ask(dit).float().square().mean()
    loss.backward()
    grads = [parameter.grad for parameter in network.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)
    return [loss.detach(), *(grad.clone() for grad in grads if grad is not None)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_losses_and_gradients_are_bit_equal_with_everything_streamed(make, checkpointing, dtype):
    expected = gradients(*make(dtype=dtype)[:2])
    dit, network, _ = make(MOST, checkpointing, dtype=dtype)
    for step in range(2):
        assert same(gradients(dit, network), expected), step


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing", "keep and offload"])
def test_fp8_weights_stream_with_their_scales(make, checkpointing):
    expected = gradients(*make(fp8=True, dtype=torch.bfloat16)[:2])
    dit, network, _ = make(MOST, checkpointing, fp8=True, dtype=torch.bfloat16)
    assert same(gradients(dit, network), expected)


@pytest.mark.parametrize("blocks_to_swap", [1, 2, 4, 6])
def test_any_number_of_blocks_changes_no_bit(make, blocks_to_swap):
    expected = gradients(*make()[:2])
    for checkpointing in ("plain", "checkpointing"):
        assert same(gradients(*make(blocks_to_swap, checkpointing)[:2]), expected)


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing", "offload"])
def test_a_training_step_prefetches_every_unit_in_both_directions(make, checkpointing):
    dit, network, swap = make(MOST, checkpointing)
    gradients(dit, network)
    swap.engine.copies.clear()
    gradients(dit, network)
    assert swap.engine.copies == [2, 3, 4, 5, 6, 4, 3, 2, 1, 0], "at either turn two units are there already"
    with torch.no_grad():
        ask(dit)
        swap.engine.copies.clear()
        ask(dit)
    assert swap.engine.copies == [1, 2, 3, 4, 5, 6, 0], "and a render goes round"


@pytest.mark.parametrize("num_slots", [1, 3, 100])
def test_any_number_of_slots_changes_no_bit(make, num_slots):
    expected = gradients(*make()[:2])
    for checkpointing in ("plain", "checkpointing"):
        assert same(gradients(*make(MOST, checkpointing, num_slots=num_slots)[:2]), expected)


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing", "offload"])
def test_rendering_between_forward_and_backward_changes_no_bit(make, checkpointing):
    plain, plain_network, _ = make()
    expected = gradients(plain, plain_network)
    with torch.no_grad():
        expected_render = ask(plain, seed=5)
    dit, network, _ = make(MOST, checkpointing)
    loss = ask(dit).square().mean()
    with torch.no_grad():
        assert torch.equal(ask(dit, seed=5), expected_render)
    loss.backward()
    assert same([loss.detach(), *(p.grad for p in network.parameters())], expected)


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing", "offload"])
def test_concurrent_and_dropped_graphs_give_the_right_gradients(make, checkpointing):
    plain, plain_network, _ = make()
    (ask(plain).square().mean() + ask(plain, seed=1).square().mean()).backward()
    dit, network, _ = make(MOST, checkpointing)
    ask(dit, seed=7)
    (ask(dit).square().mean() + ask(dit, seed=1).square().mean()).backward()
    assert same([p.grad for p in network.parameters()], [p.grad for p in plain_network.parameters()])


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing"])
def test_the_model_recovers_from_an_exception_in_a_pass(make, checkpointing):
    expected = gradients(*make()[:2])
    dit, network, _ = make(MOST, checkpointing)
    block = dit.single_blocks[5]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = block.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ask(dit)
    hook.remove()
    assert same(gradients(dit, network), expected)
    loss = ask(dit).square().mean()
    hook = next(network.parameters()).register_hook(stop)  # in the middle of a backward pass
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    hook.remove()
    assert same(gradients(dit, network), expected)


def test_outside_a_run_the_parameters_are_the_host_weights(make, weights):
    dit, _, _ = make(MOST)
    with torch.no_grad():
        ask(dit)
    state = dit.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("blocks_to_swap", [1, 2, MOST])
def test_a_write_to_a_streamed_weight_takes_effect_at_once(make, blocks_to_swap):
    resident, _, _ = make()
    dit, _, swap = make(blocks_to_swap)
    names = [name for buffer in swap.buffers for name in buffer.fields]
    with torch.no_grad():
        assert torch.equal(ask(dit), ask(resident))
        for model in (dit, resident):
            for name in names:  # as merging a LoRA does
                model.get_parameter(name).mul_(0.5)
        assert torch.equal(ask(dit), ask(resident))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_graph_that_is_dropped_without_a_backward_pass_is_freed(make, checkpointing):
    dit, _, _ = make(MOST, checkpointing)
    attention, alive = dit.attention, weakref.WeakSet()

    def remember(q_BTNK: Tensor, *args: Any) -> Tensor:
        if q_BTNK.grad_fn is not None:  # a node before the attention, which saves its own output
            q_BTNK.grad_fn.metadata["alive"] = remembered = _Remembered()
            alive.add(remembered)
        return attention(q_BTNK, *args)

    dit.attention = remember
    answer = ask(dit)
    assert alive or checkpointing != "plain", "the test sees nodes"
    del answer
    gc.collect()
    assert not alive


def test_streamed_and_resident_blocks_share_compiled_graphs(make):
    def compiled(blocks_to_swap: int) -> tuple[int, Tensor]:
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("eager")
        dit, _, _ = make(blocks_to_swap)
        for block in dit.blocks:
            block.compile(backend=graphs)
        with torch.no_grad():
            answer = ask(dit)
        return graphs.frame_count, answer

    found = [compiled(blocks_to_swap) for blocks_to_swap in (0, MOST)]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_biases_and_norms_are_not_streamed(make):
    dit, _, swap = make(MOST)
    names = streamed_parameters(dit.double_blocks[0])
    assert len(names) == 10
    assert all(name.endswith(".weight") and "norm" not in name for name in names)
    assert len(streamed_parameters(dit.single_blocks[0])) == 3
    fields = [name for buffer in swap.buffers for name in buffer.fields]
    assert len(fields) == 3 * 10 + 8 * 3


def test_the_ring_is_freed_with_the_model(make):
    dit, network, swap = make(MOST)
    gradients(dit, network)
    slot = weakref.ref(swap.slots[0].untyped_storage())
    del dit, network, swap
    gc.collect()
    assert slot() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_on_a_gpu_streamed_gradients_equal_resident_ones(weights, checkpointing):
    cuda = torch.device("cuda")
    found = []
    for blocks_to_swap in (0, MOST):
        dit = DiT(ARCH)
        dit.load_state_dict(weights)
        dit.requires_grad_(False)
        units = streamed_units(ARCH, blocks_to_swap)
        for name, parameter in dit.named_parameters():
            streamed = ".".join(name.split(".")[:2]) in sum(units, ()) and "norm" not in name
            if not (streamed and name.endswith(".weight")):
                parameter.data = parameter.data.to(cuda)
        network = AdapterNetwork.create(dit, rank=2, seed=1)
        network.to(cuda)
        network.attach(dit)
        swap = None
        if units:
            swap = BlockSwap(dit, units, cuda, checkpointing=CHECKPOINTING[checkpointing].checkpoints_blocks)
            assert swap.is_locked
        install_run_block(dit, CHECKPOINTING[checkpointing], swap)
        generator = torch.Generator().manual_seed(0)
        text = collate([(torch.randn(9, ARCH.text_dim, generator=generator), None)]).to(cuda)
        latent_BCHW = torch.randn(1, ARCH.latent_channels, 16, 16, generator=generator).to(cuda)
        for _ in range(3):
            network.zero_grad()
            out_BCHW = dit(latent_BCHW, torch.tensor([500.0], device=cuda), text)
            out_BCHW.square().mean().backward()
        found.append([out_BCHW.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for resident, streamed in zip(*found, strict=True):
        torch.testing.assert_close(streamed, resident, rtol=1e-5, atol=1e-7)
