"""Which device and which precision a stage works in."""

from __future__ import annotations

import shutil

import torch

from hyimg.errors import HyimgError
from hyimg.memory.processes import Processes
from hyimg.report import Reporter

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(name: str | None, report: Reporter | None = None) -> torch.device:
    """The device of that name, or the best there is: CUDA, then Apple's MPS, then the CPU.

    Of several processes each gets the CUDA device of its local rank, unless the name has a number. Raises
    HyimgError for a name that torch does not know or a device that this machine has not; `report` is warned where the
    CPU is taken although there is an NVIDIA driver.
    """
    processes = Processes.current()
    if processes.world > 1 and torch.cuda.is_available() and name in (None, "cuda"):
        return _device_of_rank(processes)
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if torch.backends.mps.is_available():
            return torch.device("mps")
        if report is not None and shutil.which("nvidia-smi") is not None:
            if torch.version.cuda is None:
                way_out = "install a CUDA build of torch (https://pytorch.org/get-started)"
            else:
                way_out = "update the driver, or see what `CUDA_VISIBLE_DEVICES` says"
            report.warning(
                f"an NVIDIA driver is there, but torch {torch.__version__} sees no CUDA device, and all is computed on "
                f"the CPU: {way_out}; with `--device cpu` this is not said"
            )
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HyimgError(f"`--device` `{name}` is no device", hint="use cuda, cuda:N, mps or cpu") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise HyimgError(
                f"`--device` `{name}` is not there: torch sees {count} CUDA devices",
                hint="choose another device, or install a CUDA build of torch",
            )
        device = torch.device("cuda", device.index or 0)
        # what is asked of torch without a device (page-locked memory, say) is asked of this one
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise HyimgError("`--device` `mps` is not there", hint="use `--device cpu`")
    elif device.type not in ("cuda", "mps", "cpu"):
        raise HyimgError(f"`--device` `{name}` is not supported", hint="use cuda, cuda:N, mps or cpu")
    return device


def _device_of_rank(processes: Processes) -> torch.device:
    count = torch.cuda.device_count()
    if processes.local_rank >= count:
        raise HyimgError(
            f"process {processes.local_rank + 1} on this machine has no device: torch sees {count} CUDA devices",
            hint="start one process for each device",
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)


def compute_dtype(mixed_precision: str) -> torch.dtype:
    """The type that `--mixed_precision` names: no is float32, bf16, fp16."""
    return _DTYPES[mixed_precision]


def vae_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The type that the VAE computes in: float16, as its file is, but float32 on a CPU and under `no`."""
    return torch.float32 if mixed_precision == "no" or device.type == "cpu" else torch.float16
