"""Compiled blocks: the same results, few graphs, and a missing compiler that is said before the run."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.checkpoints.names import linear_modules
from hyimg.config.models import TrainingMemory
from hyimg.errors import HyimgError
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import plan_network
from hyimg.memory import compilation
from hyimg.memory.checkpointing import checkpointed
from hyimg.memory.compilation import compile_blocks, require_compiler
from hyimg.memory.swap import BlockSwap, streamed_units
from hyimg.model.dit import DiT, collate
from hyimg.model.loading import init_random

CPU = torch.device("cpu")
OFF = TrainingMemory()
ARCH = replace(DIT_TINY, num_double=4, num_single=6)
# Latent height and width, text tokens
BUCKETS = [(4, 6, 5), (6, 4, 7), (5, 5, 9), (8, 8, 3), (2, 9, 4)]
# A double block's two halves, a single block's two, and the double's again for the first block, whose inputs need
# no gradient
GRAPHS = 6


class Graphs:
    """A backend that runs a graph as it was traced, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    graphs = Graphs()
    torch._dynamo.reset()
    monkeypatch.setattr(compilation.torch, "compile", functools.partial(torch.compile, backend=graphs))
    yield graphs
    torch._dynamo.reset()


def make(
    *, compiled: bool = False, checkpointing: TrainingMemory = OFF, blocks_to_swap: int = 0
) -> tuple[DiT, AdapterNetwork]:
    dit = DiT(ARCH)
    init_random(dit, seed=0)
    dit.requires_grad_(False)
    if compiled:
        compile_blocks(dit)
    run = dit.run_block
    if blocks_to_swap:
        swap = BlockSwap(
            dit, streamed_units(ARCH, blocks_to_swap), CPU, checkpointing=checkpointing.checkpoints_blocks
        )
        run = swap.run
    dit.run_block = checkpointed(run, checkpointing, CPU)
    if blocks_to_swap and checkpointing.checkpoints_blocks:
        dit.run_block = swap.around_checkpoint(dit.run_block)
    # Few adapters: they take most of the time that tracing takes
    plan = plan_network(linear_modules(ARCH), dim=4, alpha=4)
    plan = [module for module in plan if module.name.endswith(("txt_attn_qkv", "img_mlp.fc2", "linear1"))]
    network = AdapterNetwork.create(dit, plan=plan)
    for _, lora in network.adapters():
        torch.nn.init.normal_(lora.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    network.attach(dit)
    return dit, network


def step(
    dit: DiT, network: AdapterNetwork, bucket: tuple[int, int, int], num_images: int = 1
) -> list[Tensor]:
    """The prediction and the LoRA's gradients; prompts of several images differ in length."""
    height, width, num_text = bucket
    generator = torch.Generator().manual_seed(0)
    lengths = [num_text - i for i in range(num_images)]
    text = collate([(torch.randn(length, 64, generator=generator), None) for length in lengths])
    latent = torch.randn(num_images, 16, height, width, generator=generator)
    out = dit(latent, torch.tensor([500.0] * num_images), text)
    if torch.is_grad_enabled():
        out.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    return [out.detach(), *gradients]


def assert_near(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        # float32 in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_one_set_of_graphs_serves_all_blocks_buckets_prompts_and_multipliers(graphs: Graphs) -> None:
    compiled, plain = make(compiled=True), make()
    for bucket in BUCKETS:
        assert_near(step(*compiled, bucket), step(*plain, bucket))
    assert graphs.count == GRAPHS
    for multiplier in (0.5, -0.25):
        for _, network in (compiled, plain):
            network.set_multiplier(multiplier)
        assert_near(step(*compiled, BUCKETS[0]), step(*plain, BUCKETS[0]))
    assert graphs.count == GRAPHS

    for bucket, num_images in [(BUCKETS[0], 2), (BUCKETS[1], 3)]:
        assert_near(step(*compiled, bucket, num_images), step(*plain, bucket, num_images))
    assert graphs.count == 2 * GRAPHS, "and a second one several images at a time"


def test_streaming_and_recomputation_use_the_same_graphs(graphs: Graphs) -> None:
    checkpointing = TrainingMemory(checkpoint_keep="attention", cpu_offload_checkpointing=True)
    compiled, plain = make(compiled=True, checkpointing=checkpointing, blocks_to_swap=4), make()
    for bucket in BUCKETS[:3]:
        assert_near(step(*compiled, bucket), step(*plain, bucket))
    assert graphs.count == GRAPHS


@pytest.mark.long
def test_detached_networks_and_passes_without_gradients_give_the_right_result(graphs: Graphs) -> None:
    compiled, plain = make(compiled=True), make()
    with torch.no_grad():
        assert_near(step(*compiled, BUCKETS[0]), step(*plain, BUCKETS[0]))
        for dit, network in (compiled, plain):
            network.detach(dit)
        assert_near(step(*compiled, BUCKETS[1]), step(*plain, BUCKETS[1]))
        for dit, network in (compiled, plain):
            network.attach(dit)
            network.set_multiplier(0)
        assert_near(step(*compiled, BUCKETS[2]), step(*plain, BUCKETS[2]))


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [TrainingMemory(), TrainingMemory(checkpoint_keep="attention")])
def test_with_the_real_compiler_results_are_those_without(checkpointing: TrainingMemory) -> None:
    torch._dynamo.reset()
    compiled, plain = make(compiled=True, checkpointing=checkpointing, blocks_to_swap=3), make()
    for bucket in BUCKETS[:2]:
        assert_near(step(*compiled, bucket), step(*plain, bucket))
    torch._dynamo.reset()


def test_many_sets_of_ranks_do_not_exhaust_the_graphs() -> None:
    compile_blocks(DiT(ARCH))
    assert torch._dynamo.config.recompile_limit >= 64


def test_this_machine_can_compile_for_its_cpu() -> None:
    require_compiler(CPU)


@pytest.mark.parametrize(
    ("device", "variable", "message", "hint"),
    [
        (
            "cpu",
            "no-such-compiler -O2",
            "needs a C.. compiler, and `no-such-compiler` was not found",
            "`CXX`",
        ),
        ("cpu", None, "needs a C.. compiler, and `g..` was not found", "apt install g++"),
        ("cuda", None, "needs the package `triton`, which is not installed", "pip install triton"),
        ("mps", None, "cannot compile for `mps`", "remove `--torch_compile`"),
    ],
)
def test_a_missing_compiler_is_named(
    monkeypatch: pytest.MonkeyPatch, device: str, variable: str | None, message: str, hint: str
) -> None:
    monkeypatch.setattr(compilation.sys, "platform", "linux")
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CXX", variable) if variable else monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(HyimgError, match=message) as error:
        require_compiler(torch.device(device))
    assert error.value.exit_code == 2
    assert hint in error.value.hint


def test_missing_header_files_and_an_old_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(HyimgError, match="`Python.h` is missing"):
        require_compiler(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(HyimgError, match="7.0 or later, and this one has 6.1"):
        require_compiler(torch.device("cuda"))


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_on_windows_triton_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str
) -> None:
    monkeypatch.setattr(compilation, "_require_triton", lambda device: None)
    monkeypatch.setattr(compilation.sys, "platform", platform)
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if platform == "win32":
        require_compiler(torch.device("cuda"))
    else:
        with pytest.raises(HyimgError, match="needs a C compiler"):
            require_compiler(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_compiled_blocks_agree_with_plain_ones() -> None:
    require_compiler(torch.device("cuda", 0))
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        dit, network = make(compiled=compiled)
        dit.cuda()
        network.cuda()
        text = collate([(torch.ones(5, 64), None)]).to(torch.device("cuda", 0), torch.float32)
        out = dit(torch.ones(1, 16, 8, 8, device="cuda"), torch.tensor([500.0], device="cuda"), text)
        out.square().mean().backward()
        results.append([out.detach(), *(parameter.grad for parameter in network.parameters())])
    assert_near(*results)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has a temporary folder for each user")
def test_compiled_code_is_stored_where_only_this_user_can_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "a user's choice")
    compilation.use_private_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "a user's choice"
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        compilation.use_private_cache()
        (folder,) = tmp_path.iterdir()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has a temporary folder for each user")
@pytest.mark.parametrize("planted", ["link", "open", "file"])
def test_another_users_folder_for_compiled_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, planted: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is as it was afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    place = tmp_path / f"torchinductor-hyimg-{os.getuid()}"
    if planted == "link":
        place.symlink_to(tmp_path)
    elif planted == "open":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.touch()
    with pytest.raises(HyimgError, match="another user can write to"):
        require_compiler(CPU)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
