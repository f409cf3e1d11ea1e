"""Host memory that streamed weights live in: page-locked where a GPU copies from it.

Not torch's `pin_memory=True`: that allocator rounds every buffer up to a power of two, which at the size of a
block wastes up to half of it. Here pages are taken from the system and registered with the driver.
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
    "the driver would not lock host memory (WSL and Windows allow about half of it, and some must be free), so that "
    "copies to and from the GPU are slow and do not overlap; `--fp8_scaled` or fewer `--blocks_to_swap` need less"
)

# Every device may copy from it, not only the one that is current
_PORTABLE = 1

# Enough for every kernel's alignment, and for the widest dtype
_ALIGNMENT = 512


@dataclass(frozen=True)
class Field:
    """Where a tensor stands in a buffer: `start` in bytes."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    num_bytes: int

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in a buffer (uint8) of this layout."""
        return buffer[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class HostBuffer:
    """Tensors of any dtypes in one piece of host memory, which is copied as a whole.

    `locked` says whether its pages are locked, which `lock` asks for and the system may refuse; for the CUDA
    device that is current.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, lock: bool) -> None:
        """Copies the tensors in, one after another. Parameters move in: their own memory goes as this one comes."""
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
        # Last, since a page that is locked is there, used or not
        self.locked = lock and self._lock()

    def _take_pages(self, num_bytes: int) -> None:
        # Shared pages, which is Python's default: of private ones that a driver has locked, Linux makes a copy
        # for every process that is forked (data loader workers), all of them at once
        self._pages = mmap.mmap(-1, max(num_bytes, 1))
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8, count=max(num_bytes, 1))[:num_bytes]

    @staticmethod
    def empty(num_bytes: int, *, lock: bool) -> HostBuffer:
        """A buffer of that size whose contents are still to come."""
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
            _forget_last_cuda_error()
            return False
        # Holds the pages, so that they are not given back while the driver has them
        weakref.finalize(self, _unlock, torch.cuda.current_device(), address, self._pages)
        return True


def _unlock(device: int, address: int, pages: mmap.mmap) -> None:
    # after an error on the device, which has been told, there is nothing to wait for
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize(device)  # the last copy ahead may still be under way
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _forget_last_cuda_error() -> None:
    """The driver tells the refusal once more to the next launch, which has nothing to do with it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
