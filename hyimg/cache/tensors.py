"""torch tensors to and from the bytes of a cache entry."""

from __future__ import annotations

import torch

from hyimg.cache.entry_file import RawTensor

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """The bytes of a float16, bfloat16 or float32 tensor on any device."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return RawTensor(_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def from_raw(raw: RawTensor) -> torch.Tensor:
    """A tensor of its own memory on the CPU."""
    if 0 in raw.shape:
        return torch.empty(raw.shape, dtype=_DTYPES[raw.dtype])
    return torch.frombuffer(bytearray(raw.data), dtype=_DTYPES[raw.dtype]).reshape(raw.shape)
