"""The full 2.1 model on a GPU: steps, streaming, memory caps, and how far all of it is from the floor.

17 billion random weights, made in place; a LoRA of rank 16 on every Linear of the blocks, 8-bit AdamW, batch 1,
128 text tokens. First the device's own limits are measured: the rate of a large matrix product in bf16, the
bandwidth of its memory, and the link from and to page-locked host memory. The floor of a step is the largest of
three times: its operations at the measured rate, its weights read once a pass at the measured bandwidth, and what
it streamed at the measured rate of the link.

A memory cap holds for the whole process: what the driver and its libraries hold is taken off before torch's
allocator gets the rest. The rows of the guide's table run under a cap of their card's size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Figure, Options, apart, each_apart, median
from benchmarks.models import FULL, NUM_TEXT, RANK, TOY_DEEP, attach_lora, random_dit, training_step
from benchmarks.peaks import DevicePeak
from benchmarks.streaming import block_bytes, block_operations
from hyimg.checkpoints.architecture import SPATIAL_FACTOR, DiTArch
from hyimg.checkpoints.names import linear_modules

if TYPE_CHECKING:
    from hyimg.memory.swap import BlockSwap
    from hyimg.model.dit import DiT

SIZES = (1024, 2048)


@dataclass(frozen=True)
class Mode:
    """How a step runs: `checkpointing` is off, on, keep (attention is not recomputed) or offload."""

    checkpointing: str = "on"
    compile: bool = False

    @property
    def name(self) -> str:
        return f"checkpointing {self.checkpointing}" + (", compiled" if self.compile else "")


@dataclass(frozen=True)
class Form:
    """How a model is held, and the modes that are measured on it in one process; `cap_gb` None is no cap."""

    title: str
    modes: tuple[Mode, ...]
    fp8: bool = False
    blocks_to_swap: int = 0
    cap_gb: int | None = None


FORMS = (
    # The guide's settings first: they are what users ask about, and a long benchmark may be stopped
    Form("guide, 40 GB: bf16", (Mode("on"),), cap_gb=40),
    Form("guide, 24 GB: fp8, 9 streamed", (Mode("on"), Mode("offload")), True, 9, 24),
    Form("guide, 12 GB: fp8, 32 streamed", (Mode("on"), Mode("offload")), True, 32, 12),
    Form("guide, 8 GB: fp8, 37 streamed", (Mode("on"), Mode("offload")), True, 37, 8),
    # Compiled last: blocks stay so
    Form("bf16", (Mode("off"), Mode("on"), Mode("keep"), Mode("offload"), Mode("on", compile=True))),
    Form("fp8", (Mode("off"), Mode("on"), Mode("keep"), Mode("offload"), Mode("on", compile=True)), fp8=True),
    *(Form(f"bf16, {n} streamed", (Mode("on"), Mode("offload")), blocks_to_swap=n) for n in (9, 18, 32, 37)),
    *(
        Form(f"fp8, {n} streamed", (Mode("on"), Mode("on", compile=True)), fp8=True, blocks_to_swap=n)
        for n in (9, 37)
    ),
)


@dataclass(frozen=True)
class Limits:
    """What the device does at best: operations and bytes a second."""

    operations: float
    bandwidth: float
    to_device: float
    to_host: float


def measure(options: Options) -> Iterator[Figure]:
    """The limits, then every form in every mode and size; each as soon as it is measured, or why it failed."""
    limits: Limits = (_directly if options.toy else apart)(measure_limits, options.device, options.toy)
    yield Figure(
        "limits of the device",
        beside=f"{limits.operations / 1e12:.0f} TFLOP/s in bf16 products, {limits.bandwidth / 1e9:.0f} GB/s of memory, "
        f"link {limits.to_device / 1e9:.1f} GB/s to the device, {limits.to_host / 1e9:.1f} GB/s back",
        values=vars(limits),
    )
    for form in FORMS:
        if options.only not in form.title:
            continue
        modes = [mode for mode in form.modes if not (options.toy and mode.compile)]
        remaining = [(mode, size) for mode in modes for size in ((64,) if options.toy else SIZES)]
        while remaining:  # what comes after a failure is tried in a new process
            num_done = 0
            try:
                for result in (_directly if options.toy else each_apart)(run, form, remaining, options):
                    yield _figure(form, result, limits)
                    num_done += 1
            except Exception as error:
                mode, size = remaining[num_done]
                failure = {"size": size, "mode": mode.name, "failed": str(error) or type(error).__name__}
                yield _figure(form, failure, limits)
                num_done += 1
            remaining = remaining[num_done:]


def _directly(function: Callable[..., Any], *arguments: object) -> Any:
    return function(*arguments)


def _figure(form: Form, result: dict[str, Any], limits: Limits) -> Figure:
    name = f"{form.title}; {result['size']}x{result['size']}, {result['mode']}"
    cap = f" of {form.cap_gb} GB" if form.cap_gb else ""
    if "refused" in result:
        return Figure(name, beside=f"out of memory{cap}", values=result)
    if "failed" in result:
        return Figure(name, beside=f"failed: {result['failed'].partition(chr(10))[0][:200]}", values=result)
    seconds = result["seconds"]
    times = {
        "operations": result["operations"] / limits.operations,
        "bandwidth": result["weight_bytes"] / limits.bandwidth,
        "link": result["streamed_bytes"] / limits.to_device,
    }
    bound = max(times, key=lambda kind: times[kind])
    achieved, streamed = result["operations"] / seconds, result["streamed_bytes"] / seconds
    beside = f"{achieved / limits.operations:.0%} of the matrix peak; floor {times[bound]:.3f} s ({bound}), "
    beside += (
        f"{times[bound] / seconds:.0%} of it reached; the process has {result['process_mb']:.0f} MB{cap}"
    )
    if result["streamed_bytes"]:
        beside += f"; streams {streamed / 1e9:.1f} GB/s, {streamed / limits.to_device:.0%} of the link"
    values = {
        **result,
        "fp8": form.fp8,
        "blocks_to_swap": form.blocks_to_swap,
        "cap_gb": form.cap_gb,
        "floor_seconds": times[bound],
        "floor_of": bound,
        "of_matrix_peak": achieved / limits.operations,
        "of_link": streamed / limits.to_device,
    }
    return Figure(name, seconds, result["peak_mb"], beside, values)


def run(form: Form, configurations: Sequence[tuple[Mode, int]], options: Options) -> Iterator[dict[str, Any]]:
    """Measures modes and sizes of a form, in that order; those that do not fit have `refused`."""
    import torch

    from hyimg.errors import out_of_memory_place

    arch = TOY_DEEP if options.toy else FULL
    is_cuda = options.device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(options.device)
    if form.cap_gb is not None and is_cuda:
        _cap_memory(form.cap_gb, options.device)
    dit, swap, network, installed = None, None, None, None
    for mode, size in configurations:
        side = size // SPATIAL_FACTOR
        asked: dict[str, Any] = {"size": size, "mode": mode.name, "checkpointing": mode.checkpointing}
        try:
            if dit is None:
                dit, swap = build(form, arch, options.device)
                network = attach_lora(dit)
            if mode is not installed:
                _install(mode, dit, swap)
                installed = mode
            measured = _measure_step(dit, network, swap, side, options)
        except Exception as error:
            if out_of_memory_place(error) is None:
                raise
            measured = {"refused": str(error)}
        yield {**asked, **measured, **_needs(arch, form, mode, side)}
        if network is not None:
            network.zero_grad(set_to_none=True)
        if is_cuda:
            torch.cuda.empty_cache()


def build(form: Form, arch: DiTArch, device: str) -> tuple[DiT, BlockSwap | None]:
    """The model as `DiTSetup.load` leaves it, with random weights in place of a file's."""
    import torch

    from hyimg.memory.dit_loader import DiTPlacement
    from hyimg.memory.swap import BlockSwap, max_blocks_to_swap, streamed_units

    units = streamed_units(arch, min(form.blocks_to_swap, max_blocks_to_swap(arch)))
    target = torch.device(device)
    dit = random_dit(arch, DiTPlacement(target, torch.bfloat16, units=units, fp8=form.fp8))
    return dit, BlockSwap(dit, units, target, checkpointing=True) if units else None


def _install(mode: Mode, dit: DiT, swap: BlockSwap | None) -> None:
    from hyimg.config.models import TrainingMemory
    from hyimg.memory.dit_loader import install_run_block

    kind = mode.checkpointing
    checkpointing = TrainingMemory(
        gradient_checkpointing=kind != "off",
        checkpoint_keep="attention" if kind == "keep" else None,
        cpu_offload_checkpointing=kind == "offload",
    )
    install_run_block(dit, checkpointing, swap, torch_compile=mode.compile)


def _measure_step(
    dit: DiT, network: Any, swap: BlockSwap | None, side: int, options: Options
) -> dict[str, Any]:
    """Seconds and memory of a step, and the bytes that it streamed."""
    import torch

    step = training_step(dit, network, side)
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    with DevicePeak(options.device) as peak:
        before = swap.engine.num_bytes if swap else 0  # type: ignore[attr-defined]
        step()
        streamed = swap.engine.num_bytes - before if swap else 0  # type: ignore[attr-defined]
    process_mb = peak.num_bytes / 1e6
    if options.device.startswith("cuda"):
        reserved = torch.cuda.max_memory_reserved(options.device)
        process_mb = (_outside_the_allocator(options.device) + reserved) / 1e6
    return {
        "first_seconds": first,
        "seconds": median(step, options.runs, warm=True),  # a step ends with its loss on the host
        "peak_mb": peak.num_bytes / 1e6,
        "process_mb": process_mb,
        "streamed_bytes": streamed,
    }


def _needs(arch: DiTArch, form: Form, mode: Mode, side: int) -> dict[str, float]:
    """Operations of a step, and bytes of weights that it reads."""
    num_image = side * side
    forward = sum(block_operations(arch, num_image, NUM_TEXT).values())
    attention = 4.0 * (num_image + NUM_TEXT) ** 2 * arch.hidden * (arch.num_double + arch.num_single)
    adapters = (
        2.0
        * RANK
        * sum((m.in_features + m.out_features) * _tokens(m.name, num_image) for m in linear_modules(arch))
    )
    # Backward: the input's gradient of frozen products, both gradients of adapters and of attention
    operations = 2 * (forward - attention) + 3 * (attention + adapters)
    passes = 2
    if mode.checkpointing != "off":
        passes = 3
        operations += forward + adapters - (attention if mode.checkpointing == "keep" else 0)
    weights = sum(block_bytes(arch, fp8=form.fp8).values())
    return {"operations": operations, "weight_bytes": passes * weights}


def _tokens(name: str, num_image: int) -> int:
    block, _, kind = name.split(".")[:3]
    if kind.endswith("mod") or kind == "modulation":
        return 0
    if block == "double_blocks":
        return NUM_TEXT if kind.startswith("txt") else num_image
    return num_image + NUM_TEXT


# ---- the device itself


def measure_limits(device: str, toy: bool = False) -> Limits:
    """Rates of a large product in bf16, of a copy on the device (read and written), and of the link both ways."""
    import torch

    side, num_bytes = (64, 1 << 12) if toy else (8192, 1 << 30)
    is_cuda = device.startswith("cuda")
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    here = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(here)
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    return Limits(
        operations=2 * side**3 / _seconds_each(lambda: torch.mm(a, b, out=out), is_cuda),
        bandwidth=2 * num_bytes / _seconds_each(lambda: other.copy_(here), is_cuda),
        to_device=num_bytes / _seconds_each(lambda: here.copy_(host, non_blocking=True), is_cuda),
        to_host=num_bytes / _seconds_each(lambda: host.copy_(here, non_blocking=True), is_cuda),
    )


def _seconds_each(call: Callable[[], object], is_cuda: bool, count: int = 20) -> float:
    import torch

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - started) / count


def _cap_memory(gigabytes: int, device: str) -> None:
    """Lets this process have so many GiB of the device, the driver's share included."""
    import torch

    a = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    torch.mm(a, a)  # the libraries' own memory comes with their first use
    allowed = gigabytes * 2**30 - _outside_the_allocator(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))


def _outside_the_allocator(device: str) -> int:
    """Bytes of the device that are used and not torch's allocator's: the driver's and libraries' (and others')."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
