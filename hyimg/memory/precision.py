"""The precision of each model: one decision, made once, from the options and the devices.

    precision = decide_precision(config.compute, device, text_encoder_dtype=config.encoders.text_encoder_dtype)
    precision.log(report, "DiT", "adapters")

`auto` chooses for the DiT

- bfloat16 if the device multiplies it in hardware: GPUs from Ampere on (compute capability 8.0), AMD, Intel and Apple
  GPUs according to torch, and CPUs with instructions for it;
- float32 on other CPUs, which emulate bfloat16, up to 90 times slower;
- float16 on an older GPU. Adapters and their gradients stay float32, and the loss is scaled; activations may
  overflow (HunyuanVideo's DiT was reported to), which is an error and never a saved file.

Qwen2.5-VL is bfloat16 or float32, never float16, in which its hidden states overflow. The VAE, released in float16,
uses it on a GPU, and byT5 its file's dtype (except `wo`, which is float32 as in transformers). Both are float32 on a
CPU, which emulates float16, and with `--mixed_precision no`.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hyimg.config.models import Compute
from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError
from hyimg.memory.device import device_module
from hyimg.report import Reporter

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The dtypes of `--mixed_precision`."""

TEXT_ENCODER_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtypes of `--text_encoder_dtype`."""

OLD_GPU_WARNING = (
    "this GPU has no bf16 instructions (compute capability under 8.0), so attention uses a slow kernel, whose memory "
    "grows with the square of the number of tokens: `--mixed_precision fp16` avoids it"
)

_NAMES = {torch.float32: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}

_X86 = ("x86_64", "amd64", "i386", "i686", "x86")
# The measured product: 1 ms in float32 on a slow core, 50 ms in emulated bfloat16
_MEASURED_SIZE, _MEASURED_TIMES = 256, 4
# Other programs may double a measured time
_SLOWER = 2.0


@dataclass(frozen=True)
class Precision:
    """The decision. `mixed_precision` is the option's name of the DiT's dtype, never `auto`.

    - `text_encoder_requested`: the dtype of `--text_encoder_dtype`, None for `auto`
    - `text_encoder_asked`: whether that option or `--mixed_precision` set it
    - `byt5`: None for the dtype of byT5's file
    - `is_auto`: whether the DiT's dtype was chosen by `auto`
    """

    mixed_precision: str
    device: torch.device
    vae: torch.dtype
    text_encoder: torch.dtype
    byt5: torch.dtype | None
    text_encoder_device: torch.device
    text_encoder_requested: torch.dtype | None = None
    text_encoder_asked: bool = False
    adapters: torch.dtype = torch.float32
    is_auto: bool = False

    @property
    def dit(self) -> torch.dtype:
        return DTYPES[self.mixed_precision]

    @property
    def text_entries(self) -> tuple[str, ...]:
        """The usable dtypes of cached texts, as named by `--text_encoder_dtype`, the preferred one first."""
        first = {dtype: name for name, dtype in TEXT_ENCODER_DTYPES.items()}[self.text_encoder]
        others = [name for name in TEXT_ENCODER_DTYPES if name != first]
        return (first, *(others if self.text_encoder_requested is None else ()))

    def line(self, *models: str, cached_text: str | None = None) -> str:
        """The dtypes of `models` ("DiT", "adapters", "VAE", "text encoder", "byT5") in one line.

        `cached_text` is the dtype of cached texts, as named by `--text_encoder_dtype`.
        """
        parts = [f"{model} {_name(dtype)}" for model, (dtype, _) in self._of(models).items()]
        if cached_text is not None:
            parts.append(f"cached texts {_name(TEXT_ENCODER_DTYPES[cached_text])}")
        return f"precision: {', '.join(parts)}" + (" (`--mixed_precision auto`)" if self.is_auto else "")

    def log(self, report: Reporter, *models: str, cached_text: str | None = None) -> None:
        """Notes the line, and warns of each dtype that is slower than float32 on the CPU, or emulated by the GPU."""
        report.note(self.line(*models, cached_text=cached_text))
        is_bf16_on_gpu = "DiT" in models and self.dit == torch.bfloat16 and self.device.type == "cuda"
        if is_bf16_on_gpu and not multiplies_bf16(self.device):
            report.warning(OLD_GPU_WARNING)
        for dtype in dict.fromkeys(
            dtype for dtype, device in self._of(models).values() if device.type == "cpu"
        ):
            warning = None if dtype in (None, torch.float32) else slow_warning(dtype)
            if warning is not None:
                report.warning(warning)

    def _of(self, models: tuple[str, ...]) -> dict[str, tuple[torch.dtype | None, torch.device]]:
        known: dict[str, tuple[torch.dtype | None, torch.device]] = {
            "DiT": (self.dit, self.device),
            "adapters": (self.adapters, self.device),
            "VAE": (self.vae, self.device),
            "text encoder": (self.text_encoder, self.text_encoder_device),
            "byT5": (self.byt5, self.text_encoder_device),
        }
        return {model: known[model] for model in models}


def decide_precision(
    compute: Compute,
    device: torch.device,
    *,
    text_encoder_dtype: str = "auto",
    text_encoder_device: torch.device | None = None,
    full_bf16: bool = False,
    full_fp16: bool = False,
) -> Precision:
    """Resolves the options for the devices; text encoders are on `text_encoder_device`, by default `device`.

    `full_bf16` and `full_fp16`, the adapters' dtype, also decide the DiT's if that is `auto`. Raises HyimgError if they
    contradict `--mixed_precision`.
    """
    asked = compute.mixed_precision
    adapters = _adapters_dtype(asked, full_bf16=full_bf16, full_fp16=full_fp16)
    if asked != "auto":
        mixed_precision = asked
    elif full_bf16 or full_fp16:
        mixed_precision = "bf16" if full_bf16 else "fp16"
    else:
        mixed_precision = auto_precision(device)
    encoder_device = text_encoder_device or device
    requested = TEXT_ENCODER_DTYPES.get(text_encoder_dtype)
    chosen = requested or {"no": torch.float32, "bf16": torch.bfloat16}.get(asked)

    def half_on_gpu(device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
        return torch.float32 if asked == "no" or device.type == "cpu" else dtype

    return Precision(
        mixed_precision,
        device,
        vae=half_on_gpu(device, torch.float16) or torch.float16,
        text_encoder=chosen or _auto_text_encoder(encoder_device),
        byt5=half_on_gpu(encoder_device, None),
        text_encoder_device=encoder_device,
        text_encoder_requested=requested,
        text_encoder_asked=chosen is not None,
        adapters=adapters,
        is_auto=asked == "auto",
    )


def agreed(precision: Precision, processes: Processes) -> Precision:
    """The main process's decision in every process; all must call it.

    Processors and measurements on them may differ, and a process with another dtype would use another text cache.
    """
    names = processes.broadcast([precision.mixed_precision, precision.text_entries[0]])
    mixed_precision, text_encoder = names
    return replace(precision, mixed_precision=mixed_precision, text_encoder=TEXT_ENCODER_DTYPES[text_encoder])


def auto_precision(device: torch.device) -> str:
    """The choice of `--mixed_precision auto` on a device: "bf16", "fp16" or "no"."""
    if multiplies_bf16(device):
        return "bf16"
    return "no" if device.type == "cpu" else "fp16"


def _auto_text_encoder(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def _adapters_dtype(asked: str, *, full_bf16: bool, full_fp16: bool) -> torch.dtype:
    if full_bf16 and full_fp16:
        raise HyimgError("`--full_bf16` and `--full_fp16` exclude each other", hint="remove one of them")
    for flag, kind in ((full_bf16, "bf16"), (full_fp16, "fp16")):
        if flag and asked not in ("auto", kind):
            raise HyimgError(
                f"`--full_{kind}` needs `--mixed_precision {kind}`, not `{asked}`",
                hint=f"remove `--full_{kind}`, or give both",
            )
        if flag:
            return DTYPES[kind]
    return torch.float32


# ---- what devices support


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; depends on nothing else, so that every run agrees."""
    if device.type == "cpu":
        return _cpu_multiplies_bf16()
    if device.type == "cuda":
        # ROCm's devices are also `cuda`, with other capabilities
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return _can_multiply(torch.bfloat16, device)  # from macOS 14 on
    is_supported: Callable[..., bool] | None = getattr(device_module(device), "is_bf16_supported", None)
    if is_supported is None:
        return _can_multiply(torch.bfloat16, device)
    try:
        return is_supported(including_emulation=False)
    except TypeError:  # older releases do not have the argument
        return is_supported()


def _cpu_multiplies_bf16() -> bool:
    """Asks oneDNN, which respects `ONEDNN_MAX_CPU_ISA`; measures a product if torch lacks oneDNN (macOS).

    On x86 oneDNN also accepts AVX-512 without bfloat16 instructions, where it takes 4 times as long as in float32.
    """
    try:
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return slowdown(torch.bfloat16) <= 1
    if supported and platform.machine().lower() in _X86:
        native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in native)
    return supported


def _can_multiply(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        ones = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((ones @ ones == 2).all())
    except (RuntimeError, TypeError):
        return False


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """The measured time of a matrix product on the CPU in `dtype`, relative to float32.

    On one thread, so as not to measure how threads wait for each other on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(dtype) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    a, b = (torch.ones(_MEASURED_SIZE, _MEASURED_SIZE).to(dtype) for _ in range(2))
    times = []
    for _ in range(_MEASURED_TIMES):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return min(times)


def slow_warning(dtype: torch.dtype) -> str | None:
    """A warning, with the measured ratio, for a dtype that is slower than float32 on the CPU; else None."""
    if dtype == torch.bfloat16 and _cpu_multiplies_bf16():
        return None
    ratio = slowdown(dtype)
    if ratio < _SLOWER:
        return None
    return (
        f"this CPU is about {ratio:.0f} times slower in {_name(dtype)} than in float32 (measured): "
        "`--mixed_precision no` is faster"
    )


def _name(dtype: torch.dtype | None) -> str:
    return "as in its file" if dtype is None else _NAMES[dtype]
