"""Sums over the processes of a run, on the device: what training needs of its fellows in each step.

    with process_group(processes, device, timeout):
        sum_over_processes(gradients)

`hyimg.memory.processes` tells small things at long intervals, and waits as long as it takes; this is torch's
process group, NCCL between GPUs and gloo between CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor

from hyimg.errors import FellowLostError, RunError
from hyimg.memory.out_of_memory import out_of_memory_place
from hyimg.memory.processes import Processes
from hyimg.plugins import describe

_PIECE_VALUES = 2**24
"""Values that are summed at once, at most: 64 MB beside the gradients, whatever the network's size."""


@contextmanager
def process_group(processes: Processes, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """The time in which sums can be taken; nothing for a process alone.

    A sum for which another process does not come in `timeout` fails. Raises RunError where the processes do not
    find each other. After an error the group is left to the end of the process: to close it would make the others
    fail before they have heard of the error.
    """
    if device.type == "cuda":
        _without_broken_peer_access()
    if processes.world == 1:
        yield
        return
    # Windows has no NCCL, and gloo sums on a GPU too
    is_nccl = device.type == "cuda" and torch.distributed.is_nccl_available()
    if is_nccl:
        # It is to take its memory now and not after the first backward pass, when torch has all there is: it connects
        # at once where it knows the device, and makes its buffers then where it is told not to wait for the first sum
        os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
    try:
        torch.distributed.init_process_group(
            "nccl" if is_nccl else "gloo",
            rank=processes.rank,
            world_size=processes.world,
            timeout=timeout,
            device_id=device if is_nccl else None,
        )
    except (RuntimeError, ValueError) as error:
        if out_of_memory_place(error) is not None:
            raise
        raise RunError(
            f"the processes of this run cannot be connected: {describe(error)}",
            hint="`GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME` names the network interface to use",
        ) from error
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _without_broken_peer_access() -> None:
    """Tells NCCL of RTX 40 cards on drivers before 550.40.07, which cannot reach each other's memory.

    Accelerate, which finds that out, refuses to start where NCCL was not told.
    """
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")


@torch.no_grad()
def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes, which must call with the same shapes in the same order.

    Sums are taken in float32, on the tensors' device, and are the same bits in every process. Raises
    FellowLostError where another process is gone.
    """
    for piece in _pieces(tensors):
        flat = torch.cat([tensor.detach().flatten().float() for tensor in piece])
        try:
            torch.distributed.all_reduce(flat)
        except RuntimeError as error:
            if out_of_memory_place(error) is not None:
                raise
            raise FellowLostError(
                f"the connection to the other processes of this run is lost: {describe(error)}"
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
