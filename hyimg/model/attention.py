"""Attention over sequences that are padded at the end; the backend is chosen here, once.

No backend sees a mask tensor: where lengths differ, what is padded is left out of the arithmetic altogether,
which a mask would not do, and which keeps a GPU to its fast kernels.

Shapes: B batch, T tokens, N heads, K head size, D = N*K
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.errors import HyimgError, did_you_mean
from hyimg.model.attention_backends import PACKAGES, Kernels, load_kernels
from hyimg.model.padding import stack_padded

# Attention with its lengths bound and heads merged, (q_BTNK, k_BTNK, v_BTNK) -> (B, T, D): what a block calls
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

MODES = ("torch", *PACKAGES)


@dataclass(frozen=True)
class AttentionBackend:
    """The attention of a run."""

    kernels: Kernels
    split: bool = False
    """One sample at a time, even where lengths are equal: the least memory."""

    @property
    def name(self) -> str:
        """For the log: the library with its version, and whether samples are taken one at a time."""
        return self.kernels.name + (", one image at a time" if self.split else "")

    def __call__(
        self, q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, lengths: Sequence[int] | None
    ) -> Tensor:
        """Attention (B, T, N, K). `lengths` are the numbers of real tokens, the longest T; None: all are real.

        What stands in padded positions is finite and depends on nothing.
        """
        num_samples, num_tokens = q_BTNK.shape[:2]
        assert lengths is None or max(lengths) == num_tokens
        if num_samples == 1 or (lengths is None and not self.split):
            return self.kernels.dense(q_BTNK, k_BTNK, v_BTNK)
        lengths = lengths or [num_tokens] * num_samples
        if self.kernels.ragged is not None and not self.split:
            return self.kernels.ragged(q_BTNK, k_BTNK, v_BTNK, lengths)
        return self._one_by_one(q_BTNK, k_BTNK, v_BTNK, lengths)

    def _one_by_one(self, q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, lengths: Sequence[int]) -> Tensor:
        # Samples come of `unbind`, whose gradient is one copy: that of indexing is a batch of zeros for each of them
        samples = zip(q_BTNK.unbind(), k_BTNK.unbind(), v_BTNK.unbind(), lengths, strict=True)
        rows = [
            self.kernels.dense(q[None, :length], k[None, :length], v[None, :length])[0]
            for q, k, v, length in samples
        ]
        return stack_padded(rows)


def torch_attention(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    """torch's scaled dot-product attention, (B, T, N, K)."""
    q_BNTK, k_BNTK, v_BNTK = (x.transpose(1, 2) for x in (q_BTNK, k_BTNK, v_BTNK))
    return F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK).transpose(1, 2)


def resolve_attention(
    mode: str,
    *,
    split: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> AttentionBackend:
    """The backend of `--attn_mode` and `--split_attn` for a DiT that computes on `device` (the CPU) in `dtype`.

    Raises HyimgError for a mode that there is not, that the device or dtype excludes, that cannot train, or
    whose package is missing, broken or too old.
    """
    if mode in ("torch", "sdpa"):
        return AttentionBackend(Kernels("torch", torch_attention), split)
    if mode not in PACKAGES:
        raise HyimgError(
            f"there is no attention mode `{mode}`", hint=did_you_mean(mode, MODES) or "use `torch`"
        )
    device = device or torch.device("cpu")
    return AttentionBackend(load_kernels(mode, device=device, dtype=dtype, training=training), split)


def bind_lengths(backend: AttentionBackend, lengths: Sequence[int], num_tokens: int) -> Attend:
    """Attention for a batch whose samples have `lengths` real tokens of `num_tokens`, its heads merged.

    Where nothing is padded the backend hears of no lengths and takes its fastest way.
    """
    is_padded = any(length != num_tokens for length in lengths)

    def attend(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        return backend(q_BTNK, k_BTNK, v_BTNK, lengths if is_padded else None).flatten(2)

    return attend
