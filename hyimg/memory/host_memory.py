"""Host memory for streamed weights, page-locked for a GPU.

Not torch's `pin_memory=True`, whose allocator rounds every buffer up to a power of two and so wastes up to half. Here
pages are allocated by the system and registered with the driver.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

UNLOCKED_WARNING = (
    "the driver refused to lock host memory (WSL and Windows allow about half of it, if it is free), so copies to and "
    "from the GPU are slow and do not overlap; `--fp8_scaled` or a lower `--blocks_to_swap` need less"
)

# cudaHostRegisterPortable: every device may copy from it
_PORTABLE = 1

# Enough for every kernel's alignment, and for the widest dtype
_ALIGNMENT = 512


@dataclass(frozen=True)
class Field:
    """A tensor's place in a buffer; `start` in bytes."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    num_bytes: int

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor as a view of a buffer (uint8)."""
        return buffer[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class HostBuffer:
    """Tensors of any dtypes in one contiguous piece of host memory, to be copied at once.

    `lock` asks the system to page-lock it for the current CUDA device, which it may refuse; `locked` is the result.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, lock: bool) -> None:
        """Copies tensors one by one; parameters become views of the buffer, which frees their old memory."""
        self.fields: dict[str, Field] = {}
        end = 0
        for name, tensor in tensors.items():
            self.fields[name] = Field(tensor.dtype, tensor.shape, end, tensor.nbytes)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._take_pages(end)
        for name, tensor in tensors.items():
            view = self.view(name)
            view.copy_(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                tensor.data = view
        # Last: locking allocates every page
        self.locked = lock and self._lock()

    def _take_pages(self, num_bytes: int) -> None:
        # Shared pages, Python's default: Linux copies private locked pages for every forked process (data loader
        # workers), all at once
        self._pages = mmap.mmap(-1, max(num_bytes, 1))
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8, count=max(num_bytes, 1))[:num_bytes]

    @staticmethod
    def empty(num_bytes: int, *, lock: bool) -> HostBuffer:
        """An uninitialised buffer."""
        buffer = HostBuffer({}, lock=False)
        buffer._take_pages(num_bytes)
        buffer.locked = lock and buffer._lock()
        return buffer

    def view(self, name: str) -> Tensor:
        """The tensor in this buffer."""
        return self.fields[name].view(self.bytes)

    def _lock(self) -> bool:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self.bytes.data_ptr()
        if int(runtime.cudaHostRegister(address, self.bytes.nbytes, _PORTABLE)) != 0:
            _clear_last_error(torch.device("cuda"))
            return False
        # Keeps the pages alive while the driver uses them
        weakref.finalize(self, _unlock, torch.cuda.current_device(), address, self._pages)
        return True


def _unlock(device: int, address: int, pages: mmap.mmap) -> None:
    # after an error on the device, which was already reported, there is nothing to wait for
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize(device)  # the last prefetch may still be running
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _clear_last_error(device: torch.device) -> None:
    """Clears the driver's last error, which would otherwise be raised at the next, unrelated launch.

    torch clears it whenever it launches a kernel. `zeros` is a memset since torch 2.15, which clears nothing.
    """
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device=device).neg_()
