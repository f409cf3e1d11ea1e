"""What figures hold for: the processor, the versions, the device."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path


def describe_machine(device: str) -> dict[str, object]:
    """What the figures hold for."""
    import torch

    machine: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": f"{os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return machine


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
