"""Loading a 2 GB checkpoint: time, and the most memory at a time against the file's size and against what stays.

A DiT of a billion parameters with random weights, bf16, in original names. Each way in a process of its own, the
file in the system's cache. `own` is memory that the system cannot take back (weights that were copied); `mapped`
are pages of the file, given back whenever they are wanted. `usual` is what a careful program does without us:
safetensors' `load_file` into an empty model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure, Options, apart
from benchmarks.models import TOY_DEEP, TWO_GB, write_dit
from benchmarks.peaks import ProcessPeaks


@dataclass(frozen=True)
class Way:
    """How to load; `blocks_to_swap` -1 is all that may be."""

    name: str
    mmap: bool = True
    fp8: bool = False
    blocks_to_swap: int = 0
    usual: bool = False


WAYS = (
    Way("usual: load_file, assigned", usual=True),
    Way("bf16, mapped"),
    Way("bf16, read", mmap=False),
    Way("fp8_scaled", fp8=True),
    Way("fp8_scaled, read", fp8=True, mmap=False),
    Way("bf16, all blocks streamed that may be", blocks_to_swap=-1),
    Way("fp8_scaled, all blocks streamed that may be", fp8=True, blocks_to_swap=-1),
)


def measure(options: Options) -> Iterator[Figure]:
    """The file, then one figure a way."""
    path = options.scratch / "dit.safetensors"
    in_process = (lambda function, *arguments: function(*arguments)) if options.toy else apart
    in_process(write_dit, path, TOY_DEEP if options.toy else TWO_GB)
    size = path.stat().st_size
    yield Figure(f"the file: {size / 1e9:.2f} GB", peak_mb=size / 1e6, values={"bytes": size})
    for way in WAYS:
        results = [in_process(load, path, way, options.device, options.toy) for _ in range(options.runs)]
        best = min(results, key=lambda result: result["seconds"])
        beside = f"{best['own'] / size:.2f} of the file at the peak, {best['own_left'] / size:.2f} stays"
        if best["mapped"] > 0.01 * size:
            beside += f"; {best['mapped'] / size:.2f} mapped"
        if "device" in best:
            beside += f"; {best['device'] / size:.2f} on the device"
        values = {**vars(way), **best, "own_of_file": best["own"] / size}
        yield Figure(f"load, {way.name}", best["seconds"], best["own"] / 1e6, beside, values)


def load(path: Path, way: Way, device: str, toy: bool) -> dict[str, float]:
    """Seconds, and bytes of memory."""
    import torch

    from hyimg.checkpoints.header_check import open_dit
    from hyimg.config.models import Memory
    from hyimg.memory.dit_loader import DiTSetup
    from hyimg.memory.swap import max_blocks_to_swap
    from hyimg.model.dit import DiT
    from hyimg.report import SilentReporter

    arch = TOY_DEEP if toy else TWO_GB
    swapped = max_blocks_to_swap(arch) if way.blocks_to_swap < 0 else way.blocks_to_swap
    memory = Memory(fp8_scaled=way.fp8, blocks_to_swap=swapped)
    if device.startswith("cuda"):
        torch.zeros(1, device=device)  # the context is nobody's weights
        torch.cuda.reset_peak_memory_stats(device)
    with ProcessPeaks() as peaks:
        started = time.perf_counter()
        if way.usual:
            from safetensors.torch import load_file

            with torch.device("meta"):
                dit = DiT(arch)
            dit.load_state_dict(load_file(path), assign=True)
            dit.to(device)
        else:
            opened = open_dit(path, mmap=way.mmap)
            dit = DiTSetup(opened, memory, torch.device(device), torch.bfloat16).load(SilentReporter())
        seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "own": float(peaks.own),
        "own_left": float(peaks.own_left),
        "mapped": float(peaks.mapped),
    }
    if device.startswith("cuda"):
        result["device"] = float(torch.cuda.max_memory_allocated(device))
    del dit
    return result
