"""Recomputation in all its forms: the same gradients, bit for bit, and the memory and work that each is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.config.models import TrainingMemory
from hyimg.lora.network import AdapterNetwork
from hyimg.memory.checkpointing import checkpointed
from hyimg.model.attention import AttentionBackend, Kernels
from hyimg.model.dit import DiT, TextCondition, collate
from hyimg.model.loading import init_random

CPU = torch.device("cpu")
NUM_BLOCKS = DIT_TINY.num_double + DIT_TINY.num_single

OFF = TrainingMemory()
PLAIN = TrainingMemory(gradient_checkpointing=True)
FORMS = {
    "plain": PLAIN,
    "keep": TrainingMemory(checkpoint_keep="attention"),
    "offload": TrainingMemory(cpu_offload_checkpointing=True),
    "keep and offload": TrainingMemory(checkpoint_keep="attention", cpu_offload_checkpointing=True),
}
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


class Training:
    """A tiny DiT with a LoRA, and its step on two images whose prompts differ in length."""

    def __init__(self, options: TrainingMemory, dtype: torch.dtype = torch.float32) -> None:
        self.dit = DiT(DIT_TINY)
        init_random(self.dit, seed=0)
        self.dit.to(dtype).requires_grad_(False)
        self.network = AdapterNetwork.create(self.dit, rank=4, alpha=4)
        for _, lora in self.network.adapters():
            torch.nn.init.normal_(lora.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        self.network.attach(self.dit)
        self.dit.run_block = checkpointed(self.dit.run_block, options, CPU)

    def forward(self, timestep: float = 500.0) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        text = collate([(torch.ones(4, 64), None), (torch.ones(3, 64), torch.ones(2, 48))])
        latent = torch.randn(2, 16, 4, 6, generator=generator)
        out: Tensor = self.dit(latent, torch.tensor([timestep, 100.0]), text)
        return out.float().square().mean()

    def gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self.network.parameters()]
        self.network.zero_grad()
        return gradients


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_form
def test_every_option_gives_bit_equal_losses_and_gradients(
    options: TrainingMemory, dtype: torch.dtype
) -> None:
    plain, other = Training(OFF, dtype), Training(options, dtype)
    for timestep in (500.0, 20.0):  # buffers of the first step serve the second
        losses = [training.forward(timestep) for training in (plain, other)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        assert equal(plain.gradients(), other.gradients())


@every_form
def test_concurrent_and_dropped_graphs_give_the_right_gradients(options: TrainingMemory) -> None:
    plain, other = Training(OFF), Training(options)
    for training in (plain, other):
        training.forward(700.0)  # its graph is dropped
        first, second = training.forward(500.0), training.forward(20.0)
        first.backward()
        second.backward()
    assert equal(plain.gradients(), other.gradients())
    for training in (plain, other):
        (training.forward(500.0) + training.forward(20.0)).backward()
    assert equal(plain.gradients(), other.gradients())


@pytest.mark.parametrize("call", [5, 10], ids=["forward", "recomputation"])
@every_form
def test_an_exception_in_a_block_does_not_affect_the_next_step(options: TrainingMemory, call: int) -> None:
    plain, other = Training(OFF), Training(options)
    attention, calls = other.dit.attention, Counter()

    def interrupted(*args: Any) -> Tensor:
        calls["attention"] += 1
        if calls["attention"] == call:
            raise KeyboardInterrupt
        return attention(*args)

    other.dit.attention = interrupted
    with pytest.raises(KeyboardInterrupt):
        other.forward().backward()
    other.dit.attention = attention
    other.gradients()
    for training in (plain, other):
        training.forward().backward()
    assert equal(plain.gradients(), other.gradients())


class CountOperators(TorchDispatchMode):
    """Counts what reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attentions(self) -> int:
        return sum(n for name, n in self.counts.items() if "attention" in name and "backward" not in name)


def test_kept_attention_is_not_recomputed_and_everything_else_is() -> None:
    attentions, linears = {}, {}
    for name, options in {"off": OFF, **FORMS}.items():
        training = Training(options)
        with CountOperators() as counter:
            loss = training.forward()
            in_forward = counter.attentions
            loss.backward()
        attentions[name] = counter.attentions - in_forward
        linears[name] = counter.counts["addmm"]
    # two samples of unequal length are attended one by one
    assert attentions == {
        "off": 0,
        "plain": 2 * NUM_BLOCKS,
        "keep": 0,
        "offload": 2 * NUM_BLOCKS,
        "keep and offload": 0,
    }
    assert linears["keep"] == linears["plain"] > linears["off"]


def register_attention(name: str, runs: Counter[str]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A kernel as flash-attn has it: a torch operator inside an autograd function, with its own backward."""

    @torch.library.custom_op(name, mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        runs[name] += 1
        return q * k + v

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = forward(q, k, v)
            ctx.save_for_backward(q, k, out)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            q, k, _ = ctx.saved_tensors
            return grad * k, grad * q, grad

    return Attention.apply


@pytest.mark.parametrize(
    ("name", "is_kept"),
    [
        ("flash_attn::_flash_attn_forward", True),
        ("flash_attn::_flash_attn_varlen_forward", True),
        ("xformers_flash::flash_fwd", True),
        ("xformers_flash3::flash_fwd", True),
        ("xformers::efficient_attention_forward_cutlass", True),
        ("hyimg_test::rotate", False),
    ],
)
def test_attention_operators_of_other_libraries_are_recognised_by_name(name: str, is_kept: bool) -> None:
    runs: Counter[str] = Counter()
    kernel = register_attention(name, runs)
    gradients = []
    for options in (OFF, TrainingMemory(checkpoint_keep="attention")):
        training = Training(options)
        training.dit.attention = AttentionBackend(Kernels("double", kernel), split=True)
        runs.clear()
        loss = training.forward()
        in_forward = runs[name]
        loss.backward()
        gradients.append(training.gradients())
    assert equal(*gradients)
    assert runs[name] - in_forward == (0 if is_kept else 2 * NUM_BLOCKS)


@every_form
def test_without_gradients_nothing_is_checkpointed(options: TrainingMemory) -> None:
    seen = []

    def run(block: Any, *args: Any) -> Any:
        seen.append(args)
        return block(*args)

    wrapped = checkpointed(run, options, CPU)
    with torch.no_grad():
        wrapped(lambda x, attend: x, torch.ones(1, 2, 3), "attend")
    assert seen[0][1] == "attend"


def test_checkpointing_is_off_by_default_and_each_option_switches_it_on() -> None:
    def run(block: Any, *args: Any) -> Any:
        return block(*args)

    assert checkpointed(run, OFF, CPU) is run
    assert [options.checkpoints_blocks for options in (OFF, *FORMS.values())] == [
        False,
        True,
        True,
        True,
        True,
    ]


def saved_bytes(options: TrainingMemory) -> int:
    """What autograd holds on to between forward and backward."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    training = Training(options)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training.forward()
    return sum(seen.values())


def test_checkpointing_keeps_a_fraction_of_the_activations() -> None:
    assert saved_bytes(PLAIN) < saved_bytes(OFF) / 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_form
def test_on_a_gpu_every_option_gives_the_same_gradients(options: TrainingMemory) -> None:
    device = torch.device("cuda", 0)
    gradients = []
    for form in (OFF, options):
        training = Training(OFF, torch.bfloat16)
        training.dit.to(device)
        training.network.to(device)
        training.dit.run_block = checkpointed(training.dit.run_block, form, device)
        text = TextCondition(torch.ones(1, 4, 64), torch.ones(1, 4, dtype=torch.bool), None, None)
        for _ in range(3):
            latent = torch.ones(1, 16, 64, 64, device=device)
            out = training.dit(latent, torch.tensor([500.0], device=device), text.to(device, torch.bfloat16))
            out.float().square().mean().backward()
        gradients.append(training.gradients())
    # Attention's backward pass may add up in another order
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
