"""The training step of a mid-size DiT, beside the plain composition of the same model.

Hidden 768, 6 heads, 6 double and 12 single blocks, 230 million parameters; a LoRA of rank 16 on every Linear of
the blocks; batch 1, 128 text tokens and 256, 1024 or 4096 image tokens. Each configuration has a process of its
own. Memory is what the step adds to the model at its peak: on a CPU memory of the process, on CUDA the
allocator's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, Options, apart, median
from benchmarks.peaks import DevicePeak

if TYPE_CHECKING:
    from hyimg.model.dit import DiT

SIDES = (16, 32, 64)
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
# Counted runs shrink with the work of one
_LONG_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """One configuration: `checkpointing` is off, on, or keep (attention is not recomputed)."""

    side: int
    dtype: str
    plain: bool = False
    checkpointing: str = "off"
    fp8: bool = False
    device: str = "cpu"
    toy: bool = False

    @property
    def name(self) -> str:
        kind = "plain" if self.plain else "hyimg"
        weights = ", fp8 weights" if self.fp8 else ""
        return f"{self.side**2} tokens, {_PRECISIONS[self.dtype]}{weights}, checkpointing {self.checkpointing}, {kind}"


def measure(options: Options) -> Iterator[Figure]:
    """One figure a case; what is not plain has its ratio to the plain case of the same kind."""
    for dtype in _PRECISIONS:
        for side in (4,) if options.toy else SIDES:
            if options.only not in f"{side**2} tokens, {_PRECISIONS[dtype]}":
                continue
            plain: dict[tuple[str, bool], dict[str, float]] = {}
            for case in cases(side, dtype, options):
                runs = 1 if side**2 >= _LONG_TOKENS else options.runs
                result = run(case, runs) if options.toy else apart(run, case, runs)
                if case.plain:
                    plain[case.checkpointing, case.fp8] = result
                yield _figure(case, result, plain)


def cases(side: int, dtype: str, options: Options) -> Iterator[Case]:
    """The configurations of one size and precision, the plain ones first."""
    for plain in (True, False):
        for checkpointing in ("off", "on") if plain else ("off", "on", "keep"):
            yield Case(side, dtype, plain, checkpointing, device=options.device, toy=options.toy)
        if dtype == "bfloat16":
            yield Case(side, dtype, plain, fp8=True, device=options.device, toy=options.toy)


def _figure(case: Case, result: dict[str, float], plain: dict[tuple[str, bool], dict[str, float]]) -> Figure:
    seconds, peak_mb = result["seconds"], result["peak_mb"]
    values: dict[str, object] = {**vars(case), **result}
    beside = []
    if not case.plain:
        # Keeping attention is a kind of checkpointing; the plain composition has one kind
        kind = "off" if case.checkpointing == "off" else "on"
        against = plain[kind, case.fp8]
        values |= {
            "time_of_plain": seconds / against["seconds"],
            "memory_of_plain": peak_mb / max(against["peak_mb"], 1e-9),
        }
        beside.append(
            f"{values['time_of_plain']:.2f} of the time, {values['memory_of_plain']:.2f} of the memory"
        )
    if case.fp8:
        ratio = seconds / plain["off", False]["seconds"]
        values["time_of_plain_bf16"] = ratio
        beside.append(f"{ratio:.2f} of plain bf16's time")
    return Figure(case.name, seconds, peak_mb, "; ".join(beside), values)


def run(case: Case, runs: int) -> dict[str, float]:
    """Median seconds of a step, and the memory that it adds to the model at its peak."""
    import torch

    from benchmarks.models import MID, TOY, attach_lora, random_dit, training_step
    from benchmarks.plain import PlainBlocks
    from hyimg.config.models import TrainingMemory
    from hyimg.memory.checkpointing import checkpointed
    from hyimg.model.loading import WeightPlacement

    dit = random_dit(TOY if case.toy else MID, WeightPlacement(case.device, getattr(torch, case.dtype)))
    if case.fp8:
        quantize_blocks(dit)
    network = attach_lora(dit)
    if case.plain:
        dit.run_block = PlainBlocks(case.side**2, case.checkpointing != "off")
    else:
        kept = TrainingMemory(
            gradient_checkpointing=case.checkpointing != "off",
            checkpoint_keep="attention" if case.checkpointing == "keep" else None,
        )
        dit.run_block = checkpointed(dit.run_block, kept, dit.device)
    step = training_step(dit, network, case.side)
    step()  # makes the optimiser's state and warms caches
    with DevicePeak(case.device) as peak:
        held = torch.cuda.memory_allocated(case.device) if case.device.startswith("cuda") else 0
        loss = step()
    return {
        "seconds": median(step, runs, warm=True),
        "peak_mb": (peak.num_bytes - held) / 1e6,
        "loss": loss,
    }


def quantize_blocks(dit: DiT) -> None:
    """Replaces the block weights of a DiT by scaled fp8 ones."""
    from hyimg.memory.fp8 import is_quantised, put_scaled, quantize

    for name in [name for name, _ in dit.named_parameters() if is_quantised(name)]:
        put_scaled(dit, name, *quantize(dit.get_parameter(name)))
