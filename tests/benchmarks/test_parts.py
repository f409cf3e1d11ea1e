"""Every part of the benchmark runs, at toy sizes, and compares like with like. Nothing is timed here."""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import choices, gpu, training_run, training_step
from benchmarks.__main__ import PARTS, main, row
from benchmarks.figures import Figure, Options, each_apart
from benchmarks.models import TOY, attach_lora, inputs, random_dit
from benchmarks.peaks import ProcessPeaks
from benchmarks.plain import PlainBlocks
from benchmarks.streaming import MACHINES, TOKENS, block_bytes, block_operations, simulate
from hyimg.checkpoints.architecture import DIT_2_1
from hyimg.checkpoints.names import dit_shapes
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT
from hyimg.model.loading import WeightPlacement

SIDE = 4


def toy(tmp_path: Path, **changes: str) -> Options:
    return Options(tmp_path, runs=1, toy=True, **changes)


@pytest.mark.parametrize("part", ["loading", "vae_memory", "training_step"])
def test_a_part_measures_at_toy_sizes(part: str, tmp_path: Path) -> None:
    figures = list(importlib.import_module(f"benchmarks.{part}").measure(toy(tmp_path, only="fp32")))
    assert len({figure.name for figure in figures}) == len(figures) >= 5
    assert all(figure.peak_mb is not None for figure in figures)


def test_a_run_is_taken_apart_into_model_optimiser_and_loop(tmp_path: Path) -> None:
    step, start = training_run.measure(toy(tmp_path, only="fp32"))
    assert (
        step.values["step"] > step.values["forward"] + step.values["backward"] + step.values["optimizer"] > 0
    )
    assert step.values["loop_share"] > 0
    assert start.values["to_first_step"] > start.values["to_run_start"] > 0


def test_the_gpu_part_runs_on_a_cpu_too(tmp_path: Path) -> None:
    limits, *figures = gpu.measure(toy(tmp_path, only="37 streamed"))
    assert limits.values["to_device"] > 0
    streamed = [figure.values["streamed_bytes"] for figure in figures]
    assert [figure.name.partition(":")[0].partition(";")[0] for figure in figures] == [
        *["guide, 8 GB"] * 2,
        *["bf16, 37 streamed"] * 2,
        "fp8, 37 streamed",
    ], "the guide's first, and nothing compiled"
    assert min(streamed) > 0
    assert streamed[4] < 0.6 * streamed[2], "fp8 is about half of bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_memory_cap_holds_on_a_gpu(tmp_path: Path) -> None:
    form = next(form for form in gpu.FORMS if form.cap_gb == 8)
    try:
        options = Options(tmp_path, runs=1, device="cuda:0", toy=True)
        for result in gpu.run(form, [(mode, 64) for mode in form.modes], options):
            assert result["process_mb"] < 8 * 2**30 / 1e6
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(8 << 30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(gpu, "_measure_step", refuse)
    figures = list(gpu.measure(toy(tmp_path, only="guide, 8 GB")))
    assert [figure.beside for figure in figures[1:]] == ["out of memory of 8 GB"] * 2


def test_a_failing_configuration_is_a_row_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_step = gpu._measure_step
    calls = []

    def fail_once(*arguments: object) -> dict[str, object]:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return measure_step(*arguments)

    monkeypatch.setattr(gpu, "_measure_step", fail_once)
    _, failed, measured = gpu.measure(toy(tmp_path, only="guide, 8 GB"))
    assert failed.beside == "failed: CUDA error: an illegal memory access was encountered"
    assert measured.seconds is not None


def count_to(number: int) -> Iterator[int]:
    """For the test below, in its own process."""
    yield from range(number)
    if number == 3:
        raise ValueError("three")
    if number == 4:
        os._exit(9)


@pytest.mark.parametrize(("number", "message"), [(2, None), (3, "three"), (4, "the process ended with 9")])
def test_answers_of_a_process_come_one_by_one_and_its_end_is_reported(
    number: int, message: str | None
) -> None:
    answers = []
    expected = pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext()
    with expected:
        answers.extend(each_apart(count_to, number))
    assert answers == list(range(number))


# ---- the plain composition is the same model


@pytest.fixture
def model() -> tuple[DiT, AdapterNetwork]:
    dit = random_dit(TOY, WeightPlacement("cpu", torch.float32))
    network = attach_lora(dit, rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, lora in network.adapters():
            lora.lora_up.weight.normal_(0, 0.1, generator=generator)
    return dit, network


def results(dit: DiT, network: AdapterNetwork) -> list[Tensor]:
    """The velocity, and the gradient of every adapter."""
    velocity_BCHW = dit(*inputs(dit, SIDE, num_text=7))
    velocity_BCHW.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    return [velocity_BCHW.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_plain_composition_computes_the_same(
    model: tuple[DiT, AdapterNetwork], checkpointing: bool, fp8: bool
) -> None:
    dit, network = model
    if fp8:
        training_step.quantize_blocks(dit)
    ours = results(dit, network)
    dit.run_block = PlainBlocks(SIDE * SIDE, checkpointing)
    plain = results(dit, network)
    assert len(ours) == len(plain) == 1 + 2 * len(network.plan)
    for a, b in zip(ours, plain, strict=True):
        # float32 that is summed in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)


def test_each_training_case_is_compared_with_the_plain_one_of_its_kind(tmp_path: Path) -> None:
    figures = list(training_step.measure(toy(tmp_path, only="bf16")))
    of_plain = {
        f.values["checkpointing"]: f for f in figures if not f.values["plain"] and not f.values["fp8"]
    }
    plain = {
        f.values["checkpointing"]: f.seconds for f in figures if f.values["plain"] and not f.values["fp8"]
    }
    for kind, against in (("off", "off"), ("on", "on"), ("keep", "on")):
        ratio = of_plain[kind].values["time_of_plain"]
        assert ratio == pytest.approx(of_plain[kind].seconds / plain[against])
    losses = [figure.values["loss"] for figure in figures]
    # the same step of the same model; bf16, and fp8 weights
    assert max(losses) - min(losses) < 0.1 * min(losses)


# ---- operations, bytes and the virtual clock


def test_operations_of_the_blocks_are_those_that_torch_counts() -> None:
    dit = random_dit(TOY, WeightPlacement("cpu", torch.float32))
    num_text, counted = 7, 0

    def counting(block: torch.nn.Module, *args: object) -> object:
        nonlocal counted
        with FlopCounterMode(display=False) as counter:
            outputs = block(*args)
        counted += counter.get_total_flops()
        return outputs

    dit.run_block = counting
    # of attention torch counts the plain products only
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dit(*inputs(dit, SIDE, num_text))
    modulation = 2 * dit.arch.hidden**2 * (12 * dit.arch.num_double + 3 * dit.arch.num_single)
    assert sum(block_operations(dit.arch, SIDE**2, num_text).values()) == counted - modulation


def test_bytes_of_the_blocks_are_those_of_their_weights() -> None:
    weights = sum(
        out_features * in_features
        for name, (out_features, *rest) in dit_shapes(DIT_2_1).items()
        if "_blocks." in name and not name.startswith("txt_in") and len(rest) == 1
        for in_features in rest
    )
    assert sum(block_bytes(DIT_2_1, fp8=False).values()) == 2 * weights
    assert sum(block_bytes(DIT_2_1, fp8=True).values()) == weights * 1.0625


@pytest.mark.parametrize("blocks_to_swap", [9, 37])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_simulated_step_takes_no_less_than_its_larger_lane_and_no_more_than_both(
    machine: object, blocks_to_swap: int
) -> None:
    total, computing, copying = simulate(DIT_2_1, machine, blocks_to_swap, fp8=False)
    assert max(computing, copying) <= total * (1 + 1e-9)
    assert total < computing + copying
    operations = sum(block_operations(DIT_2_1, TOKENS).values())
    assert computing == pytest.approx(3 * operations / machine.compute)


@pytest.mark.long
def test_choices_are_trained_and_judged_with_several_seeds(tmp_path: Path) -> None:
    (figure,) = choices.measure(toy(tmp_path, only="as the demo"))
    assert set(figure.values) == {"with trigger", "without", "validation loss"}
    assert all(len(values) == 2 for values in figure.values.values())
    assert all(0 <= share <= 1 for share in (*figure.values["with trigger"], *figure.values["without"]))


# ---- the command


def test_the_command_stays_small_so_that_the_peaks_of_what_it_starts_are_their_own() -> None:
    modules = ", ".join(f"benchmarks.{part}" for part in ("__main__", *PARTS))
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


def test_the_command_writes_a_table_and_a_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["streaming", "--toy", "--output", str(tmp_path / "bench")])
    table = capsys.readouterr().out
    document = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert document["toy"] is True
    assert document["machine"]["cpu"] in table
    (figures,) = document["parts"].values()
    assert all(figure["name"] in table for figure in figures)
    assert not (tmp_path / "bench" / "scratch").exists()


def test_help_lists_the_parts_and_another_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert all(part in listed for part in PARTS)
    with pytest.raises(SystemExit) as ended:
        main(["nothing"])
    assert ended.value.code == 2
    assert "there is no part `nothing`" in capsys.readouterr().err


def test_a_row_leaves_out_what_was_not_measured() -> None:
    assert row(Figure("a", beside="b")).split() == ["a", "b"]
    assert row(Figure("a", 1.5, 2.0)).split() == ["a", "1.500", "s", "2", "MB"]


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads Linux's counts of memory")
@pytest.mark.parametrize("flags", ["MAP_PRIVATE", "MAP_SHARED"])
def test_memory_of_either_kind_is_the_processs_own(flags: str) -> None:
    num_bytes = 64 << 20  # glibc may keep freed blocks of up to 32 MB, as of the bytes written below
    with ProcessPeaks() as peaks:
        pages = mmap.mmap(-1, num_bytes, flags=getattr(mmap, flags) | mmap.MAP_ANONYMOUS)
        pages.write(b"x" * num_bytes)
        left = len(pages)
        time.sleep(0.5)  # counts are looked at every few milliseconds, on an idle machine
        pages.close()
    assert left == num_bytes
    # other memory of this process may go meanwhile
    assert peaks.own >= 0.7 * num_bytes
    assert peaks.own_left < num_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_that_was_freed_before_is_counted_when_it_is_used_again() -> None:
    num_bytes = 64 << 20

    def fill() -> list[bytearray]:
        return [bytearray(b"x" * 65536) for _ in range(num_bytes // 65536)]  # small enough for the heap

    blocks = fill()
    kept = blocks[::16]  # what is free between them stays the allocator's
    del blocks
    with ProcessPeaks() as peaks:
        blocks = fill()
        time.sleep(0.5)
    assert peaks.own >= 0.7 * num_bytes
    del blocks, kept
