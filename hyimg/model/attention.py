"""Attention over sequences that are padded at the end; the backend is chosen here, once.

Shapes: B batch, T tokens, N heads, K head size, D = N*K
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.errors import HyimgError, did_you_mean

# (q_BTNK, k_BTNK, v_BTNK, lengths) -> (B, T, N, K). Lengths are the numbers of real tokens, None where all
# of T are real. What a backend returns in padded positions is finite and depends on nothing
AttentionBackend = Callable[[Tensor, Tensor, Tensor, Sequence[int] | None], Tensor]
# The same with its lengths bound and heads merged: what a block calls
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_LATER = ("xformers", "flash", "sageattn")


def torch_attention(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """torch's scaled dot-product attention.

    Unequal lengths are taken one sample at a time: a mask would keep the GPU from its flash kernel and is
    slower on the CPU too, and what is padded is then left out of the arithmetic altogether.
    """
    if lengths is None:
        return _dense(q_BTNK, k_BTNK, v_BTNK)
    rows = []
    for sample, length in enumerate(lengths):
        q, k, v = (x[sample : sample + 1, :length] for x in (q_BTNK, k_BTNK, v_BTNK))
        rows.append(F.pad(_dense(q, k, v), (0, 0, 0, 0, 0, q_BTNK.shape[1] - length)))
    return torch.cat(rows)


def _dense(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    q_BNTK, k_BNTK, v_BNTK = (x.transpose(1, 2) for x in (q_BTNK, k_BTNK, v_BTNK))
    return F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK).transpose(1, 2)


def resolve_attention(mode: str) -> AttentionBackend:
    """The backend of `--attn_mode`; raises `HyimgError` for one that is not there."""
    if mode in ("torch", "sdpa"):
        return torch_attention
    if mode in _LATER:
        raise HyimgError(f"attention mode `{mode}` comes in a later release", hint="use `torch`")
    raise HyimgError(
        f"there is no attention mode `{mode}`", hint=did_you_mean(mode, ("torch", "sdpa")) or "use `torch`"
    )


def bind_lengths(backend: AttentionBackend, lengths: Sequence[int], num_tokens: int) -> Attend:
    """Attention for a batch whose samples have `lengths` real tokens of `num_tokens`, its heads merged.

    Where nothing is padded the backend hears of no lengths and takes its fastest way.
    """
    is_padded = any(length != num_tokens for length in lengths)

    def attend(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        return backend(q_BTNK, k_BTNK, v_BTNK, lengths if is_padded else None).flatten(2)

    return attend
