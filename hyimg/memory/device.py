"""The device of a stage, and its properties, through torch's accelerator API.

`torch.accelerator` covers the one kind of accelerator that a torch build supports: NVIDIA's CUDA, AMD's ROCm (also
named `cuda`), Intel's `xpu`, Apple's `mps`. What it lacks is looked up in the kind's module (`torch.cuda`,
`torch.xpu`, ...), with a fallback.
"""

from __future__ import annotations

import shutil
import warnings
from types import ModuleType

import psutil
import torch
from torch import Tensor

from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError
from hyimg.report import Reporter, count_text

# Devices that share the host's memory: moving weights to the host saves nothing
SHARES_HOST_MEMORY = ("cpu", "mps")


def accelerator() -> str | None:
    """The device type of the available accelerator ("cuda", "xpu", "mps"), or None."""
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None and torch.accelerator.device_count() > 0 else None


def resolve_device(name: str | None, report: Reporter | None = None) -> torch.device:
    """The device of that name; by default the accelerator if there is one, else the CPU.

    Each of several processes gets the accelerator of its local rank, unless the name has a number. Raises HyimgError
    for an unknown name or a missing device; warns if the CPU is used although an NVIDIA driver is installed.
    """
    kind, processes = accelerator(), Processes.current()
    if name is None and kind is None:
        _warn_of_idle_driver(report)
        return torch.device("cpu")
    if name in (None, kind) and kind is not None:
        if kind == "mps":
            return torch.device("mps")
        if processes.world > 1:
            return _made_current(torch.device(kind, processes.local_rank), processes)
        if name is None:
            return torch.device(kind, torch.get_device_module(kind).current_device())
    assert name is not None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HyimgError(f"`--device` `{name}` is not a device", hint=_choices(kind)) from error
    if device.type == "cpu":
        return device
    if device_module(device) is None:
        raise HyimgError(f"`--device` `{name}` is not supported", hint=_choices(kind))
    count = torch.accelerator.device_count() if device.type == kind else 0
    if (device.index or 0) >= count:
        raise HyimgError(
            f"`--device` `{name}` was not found: torch sees {_devices(device.type, count)}",
            hint=f"{_choices(kind)}" + ("" if count else ", or install a build of torch for this device"),
        )
    return (
        torch.device("mps") if kind == "mps" else _made_current(torch.device(device.type, device.index or 0))
    )


def _made_current(device: torch.device, processes: Processes | None = None) -> torch.device:
    """Makes the device torch's current one, for calls that take none (page-locked memory), and returns it.

    Raises HyimgError if a process has no device of its own.
    """
    count = torch.accelerator.device_count()
    if processes is not None and processes.local_rank >= count:
        raise HyimgError(
            f"process {processes.local_rank + 1} on this machine has no device: torch sees "
            f"{_devices(device.type, count)}",
            hint="start one process for each device",
        )
    torch.get_device_module(device.type).set_device(device)
    return device


def _devices(kind: str, count: int) -> str:
    return count_text(count, "CUDA device" if kind == "cuda" else f"{kind} device")


def _choices(kind: str | None) -> str:
    if kind is None:
        return "use `--device cpu`, the only device here"
    numbered = "" if kind == "mps" else f", `{kind}:N`"
    return f"use `{kind}`{numbered} or `cpu`"


def _warn_of_idle_driver(report: Reporter | None) -> None:
    if report is None or shutil.which("nvidia-smi") is None:
        return
    if torch.version.cuda is None:
        way_out = "install a CUDA build of torch (https://pytorch.org/get-started)"
    else:
        way_out = "update the driver, or check `CUDA_VISIBLE_DEVICES`"
    report.warning(
        f"an NVIDIA driver is installed, but torch {torch.__version__} sees no CUDA device, so the CPU is used: "
        f"{way_out}; `--device cpu` silences this warning"
    )


# ---- properties of a device


def device_module(device: torch.device) -> ModuleType | None:
    """`torch.cuda`, `torch.xpu` or `torch.mps`; None for the CPU and devices without a module."""
    if device.type == "cpu":
        return None
    try:
        module: ModuleType = torch.get_device_module(device.type)
    except RuntimeError:
        return None
    return module


def device_name(device: torch.device) -> str:
    """The name of the card, or its type if it has no name; "none" for the CPU."""
    if device.type == "cpu":
        return "none"
    name = getattr(device_module(device), "get_device_name", None)
    return str(name(device)) if name is not None else device.type


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory; None if it shares the host's, or if unknown."""
    if device.type in SHARES_HOST_MEMORY:
        return None
    properties = getattr(device_module(device), "get_device_properties", None)
    return getattr(properties(device), "total_memory", None) if properties is not None else None


def host_memory() -> int:
    """Bytes of this machine's memory, including swap."""
    # of pages swapped in and out, which containers without /proc/vmstat lack and nothing here reads
    warnings.filterwarnings("ignore", message="'sin' and 'sout' swap memory", category=RuntimeWarning)
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def peak_memory(device: torch.device) -> int | None:
    """The peak of the bytes that torch has allocated on the device; None if not counted."""
    peak = getattr(device_module(device), "max_memory_allocated", None)
    return None if peak is None else int(peak(device))


def empty_cache(device: torch.device) -> None:
    """Releases the device memory that torch's allocator caches."""
    release = getattr(device_module(device), "empty_cache", None)
    if release is not None:
        release()


def rng_state(device: torch.device) -> Tensor | None:
    """The state of the device's random generator (uint8); None for the CPU."""
    read = getattr(device_module(device), "get_rng_state", None)
    if read is None:
        return None
    state: Tensor = read() if device.type == "mps" else read(device)
    return state


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Restores a state from `rng_state`."""
    write = getattr(device_module(device), "set_rng_state", None)
    if write is not None:
        write(state) if device.type == "mps" else write(state, device)


def has_float64(device: torch.device) -> bool:
    """Whether the device supports float64; Apple's GPUs and many of Intel's do not."""
    if device.type == "mps":
        return False
    properties = getattr(device_module(device), "get_device_properties", None)
    return properties is None or bool(getattr(properties(device), "has_fp64", True))
