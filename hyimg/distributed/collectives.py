"""Sums over the processes of a run, on the device, for gradients.

    with process_group(processes, device, timeout):
        sum_over_processes(gradients)

Uses torch's process group: NCCL on NVIDIA and AMD GPUs, XCCL on Intel's, gloo on CPUs. `hyimg.distributed.processes`
is for small values at long intervals, and has no timeout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor

from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError, PeerProcessLostError, RunError, exception_text, out_of_memory_place

_PIECE_VALUES = 2**24
"""The most values that are summed at once: a buffer of 64 MB, whatever the network's size."""


@contextmanager
def process_group(processes: Processes, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """Connects the processes for the block; does nothing for a single process.

    A sum fails if another process does not join it within `timeout`. Raises RunError if the processes cannot
    connect. After an error the group stays open until the process ends: closing it would make the others fail before
    they learn of the error.
    """
    if device.type == "cuda":
        _without_broken_peer_access()
    if processes.world == 1:
        yield
        return
    backend = backend_for(device)
    if backend == "nccl":
        # Allocate NCCL's memory now, not after the first backward pass, when torch holds all there is: with a device
        # id it connects at once, and with this variable it allocates its buffers then
        os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
    try:
        torch.distributed.init_process_group(
            backend,
            store=processes.group_store(),
            rank=processes.rank,
            world_size=processes.world,
            timeout=timeout,
            device_id=None if backend == "gloo" else device,
        )
    except (RuntimeError, ValueError) as error:
        if out_of_memory_place(error) is not None:
            raise
        raise RunError(
            f"the processes of this run cannot be connected: {exception_text(error)}",
            hint="`GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME` names the network interface to use",
        ) from error
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def backend_for(device: torch.device) -> str:
    """The backend for a device: torch's default if this build has it, else gloo, which supports CPUs and CUDA.

    Windows has no NCCL. Raises HyimgError if neither works.
    """
    backend = torch.distributed.get_default_backend_for_device(device)
    if torch.distributed.is_backend_available(backend):
        return str(backend)
    if device.type in ("cpu", "cuda"):
        return "gloo"
    raise HyimgError(
        f"several processes on `{device.type}` need `{backend}`, which this build of torch {torch.__version__} lacks",
        hint="start one process, or install a build of torch with it",
    )


def _without_broken_peer_access() -> None:
    """Disables NCCL's peer access for RTX 40 cards on drivers before 550.40.07, where it does not work.

    Accelerate detects that, and refuses to start without these variables.
    """
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")


@torch.no_grad()
def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor, of any float dtype, by its sum over all processes.

    All must pass the same shapes in the same order. Sums are computed in float32 on the tensors' device, and are
    bit-identical in every process. Raises PeerProcessLostError if another process has ended.
    """
    for piece in _pieces(tensors):
        flat = torch.cat([tensor.detach().flatten().float() for tensor in piece])
        try:
            torch.distributed.all_reduce(flat)
        except RuntimeError as error:
            if out_of_memory_place(error) is not None:
                raise
            raise PeerProcessLostError(
                f"lost the connection to the other processes of this run: {exception_text(error)}"
            ) from error
        totals = torch.split_with_sizes(flat, [tensor.numel() for tensor in piece])
        for tensor, total in zip(piece, totals, strict=True):
            tensor.copy_(total.view_as(tensor))


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    piece: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if piece and count + tensor.numel() > _PIECE_VALUES:
            yield piece
            piece, count = [], 0
        piece.append(tensor)
        count += tensor.numel()
    if piece:
        yield piece
