"""Attention over sequences that are padded at the end, and its backends.

No backend gets a mask tensor: if lengths differ, padding is excluded from the computation, which keeps a GPU on its
fast kernels. Signatures and layouts of other packages, from their sources:

    flash-attn     flash_attn_func(q, k, v) on (B, T, N, K); flash_attn_varlen_func on packed (tokens, N, K)
                   with int32 boundaries. From 2.7 on its kernels are torch operators, which `--checkpoint_keep
                   attention` relies on
    xformers       memory_efficient_attention(q, k, v, attn_bias) on (B, T, N, K), packed tokens in a batch of
                   one with a BlockDiagonalMask, which 0.0.27 and later create on a device
    sageattention  sageattn(q, k, v, tensor_layout="NHD") on (B, T, N, K), without gradients

Shapes: B batch, T tokens of the longest sample, N heads, K head size, D = N*K, P tokens of all samples, packed
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.errors import HyimgError, did_you_mean


def pack(x_BT: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packs the real tokens of padded samples: (B, T, ...) to (P, ...)."""
    return torch.cat([x_T[:length] for x_T, length in zip(x_BT.unbind(), lengths, strict=True)])


def unpack(x_P: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inverse of `pack`: (P, ...) to (B, T, ...), padded with zeros."""
    return stack_padded(torch.split(x_P, list(lengths)))


def stack_padded(rows: Sequence[Tensor]) -> Tensor:
    """Stacks rows (t, ...) of different lengths as (B, T, ...), padded with zeros.

    Like `torch.nn.utils.rnn.pad_sequence`, whose backward pass copies the full gradient once for each row.
    """
    longest = max(map(len, rows))
    parts = []
    for row in rows:
        parts.append(row)
        if len(row) < longest:
            parts.append(row.new_zeros(longest - len(row), *row.shape[1:]))
    return torch.cat(parts).view(len(rows), longest, *rows[0].shape[1:])


Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
Ragged = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


class Kernels(NamedTuple):
    """A package's attention functions, and its name for the log."""

    name: str
    dense: Dense
    """(q_BTNK, k_BTNK, v_BTNK) -> (B, T, N, K), without padding."""
    ragged: Ragged | None = None
    """The same with the samples' lengths, the longest of which is T; None: one sample at a time."""


@dataclass(frozen=True)
class _Package:
    """A backend's package and its requirements."""

    module: str
    minimum: str
    install: str
    build: Callable[[ModuleType, str], Kernels]
    takes_float32: bool = False
    trains: bool = True


def load_kernels(mode: str, *, device: torch.device, dtype: torch.dtype, training: bool) -> Kernels:
    """Loads the kernels of an `--attn_mode` in `PACKAGES`.

    Raises HyimgError if the run cannot use them, or if the package is missing, broken or too old.
    """
    package = PACKAGES[mode]
    if training and not package.trains:
        raise HyimgError(
            f"`--attn_mode {mode}` cannot train: its kernels have no backward pass",
            hint="train with `torch`, `flash` or `xformers`",
        )
    if device.type != "cuda":
        raise HyimgError(
            f"`--attn_mode {mode}` needs a CUDA device, and this run is on `{device.type}`",
            hint="use `--attn_mode torch`",
        )
    if dtype == torch.float32 and not package.takes_float32:
        raise HyimgError(
            f"`--attn_mode {mode}` computes in bf16 or fp16, and this run is in float32",
            hint="use `--mixed_precision bf16`, or `--attn_mode torch`",
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise HyimgError(
            f"`--attn_mode {mode}` needs a GPU of compute capability 8.0 (Ampere) or later, "
            f"and this one has {capability[0]}.{capability[1]}",
            hint="use `--attn_mode torch`",
        )
    module, version = _import(mode, package)
    try:
        return package.build(module, version)
    except AttributeError as error:
        raise HyimgError(
            f"`--attn_mode {mode}`: `{package.module}` {version} lacks `{error.name}`",
            hint=f"install a version that has it: `{package.install}`",
        ) from error
    except (ImportError, OSError) as error:  # of a part that a binary for another torch lacks
        raise HyimgError(
            f"`--attn_mode {mode}`: `{package.module}` {version} cannot be used: {str(error).strip()}",
            hint=f"install it for torch {torch.__version__} again: `{package.install}`",
        ) from error


def _import(mode: str, package: _Package) -> tuple[ModuleType, str]:
    name = package.module
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a binary for another torch may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise HyimgError(
                f"`--attn_mode {mode}` needs the package `{name}`, which is not installed",
                hint=f"run `{package.install}`",
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HyimgError(
            f"`--attn_mode {mode}`: the package `{name}` cannot be imported: {reason}",
            hint=f"install it for torch {torch.__version__} again: `{package.install}`",
        ) from error
    version = str(getattr(module, "__version__", None) or importlib.metadata.version(name))
    if _parts(version) < _parts(package.minimum):
        raise HyimgError(
            f"`--attn_mode {mode}` needs `{name}` {package.minimum} or later, and {version} is installed",
            hint=f"run `{package.install} --upgrade`",
        )
    return module, version


def _parts(version: str) -> list[int]:
    """The leading numbers of a version: 2.7.4 for 2.7.4.post1+cu126."""
    release = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in release[0].split(".")] if release else []


def _flash(module: ModuleType, version: str) -> Kernels:
    dense, ragged = module.flash_attn_func, module.flash_attn_varlen_func

    def attend(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        out: Tensor = dense(q_BTNK, k_BTNK, v_BTNK, deterministic=_deterministic())
        return out

    def attend_ragged(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, lengths: Sequence[int]) -> Tensor:
        bounds = _bounds(tuple(lengths), q_BTNK.device)
        q_PNK, k_PNK, v_PNK = (pack(x, lengths) for x in (q_BTNK, k_BTNK, v_BTNK))
        longest = max(lengths)
        out_PNK: Tensor = ragged(
            q_PNK, k_PNK, v_PNK, bounds, bounds, longest, longest, deterministic=_deterministic()
        )
        return unpack(out_PNK, lengths)

    return Kernels(f"flash-attn {version}", attend, attend_ragged)


def _xformers(module: ModuleType, version: str) -> Kernels:
    ops = importlib.import_module("xformers.ops")
    attention, masks = ops.memory_efficient_attention, ops.fmha.attn_bias.BlockDiagonalMask

    @functools.lru_cache(maxsize=8)
    def mask(lengths: tuple[int, ...], device: torch.device) -> Any:
        return masks.from_seqlens(list(lengths), device=device)

    def attend(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        out: Tensor = attention(q_BTNK, k_BTNK, v_BTNK)
        return out

    def attend_ragged(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, lengths: Sequence[int]) -> Tensor:
        q_1PNK, k_1PNK, v_1PNK = (pack(x, lengths)[None] for x in (q_BTNK, k_BTNK, v_BTNK))
        bias = mask(tuple(lengths), q_BTNK.device)
        return unpack(attention(q_1PNK, k_1PNK, v_1PNK, attn_bias=bias)[0], lengths)

    return Kernels(f"xformers {version}", attend, attend_ragged)


def _sage(module: ModuleType, version: str) -> Kernels:
    sageattn = module.sageattn

    def attend(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        out: Tensor = sageattn(q_BTNK, k_BTNK, v_BTNK, tensor_layout="NHD", is_causal=False)
        return out

    return Kernels(f"sageattention {version}", attend)


PACKAGES = {
    "xformers": _Package("xformers", "0.0.27", "pip install xformers", _xformers, takes_float32=True),
    "flash": _Package("flash_attn", "2.7.0", "pip install flash-attn --no-build-isolation", _flash),
    "sageattn": _Package("sageattention", "1.0.6", "pip install sageattention", _sage, trains=False),
}


def _deterministic() -> bool:
    """Whether torch must use deterministic kernels; flash-attn has a slower one for the backward pass."""
    return torch.are_deterministic_algorithms_enabled()


@functools.lru_cache(maxsize=8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The boundaries of packed samples: int32 (B+1).

    Cached, because every block of a forward pass needs the same, and each transfer blocks the host.
    """
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


# (q_BTNK, k_BTNK, v_BTNK) -> (B, T, D): attention with bound lengths and merged heads, as called by a block
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

MODES = ("torch", *PACKAGES)


@dataclass(frozen=True)
class AttentionBackend:
    """A run's attention."""

    kernels: Kernels
    split: bool = False
    """One sample at a time, even if lengths are equal: needs the least memory."""

    @property
    def name(self) -> str:
        """The library with its version, and whether it runs one sample at a time, for the log."""
        return self.kernels.name + (", one image at a time" if self.split else "")

    def __call__(
        self, q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, lengths: Sequence[int] | None
    ) -> Tensor:
        """Attention (B, T, N, K) in the inputs' dtype. `lengths` are the numbers of real tokens; None: all T.

        Padded positions of the result are finite and do not depend on the inputs.
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
        # `unbind`, whose gradient is one copy; that of indexing is a batch of zeros for each sample
        samples = zip(q_BTNK.unbind(), k_BTNK.unbind(), v_BTNK.unbind(), lengths, strict=True)
        rows = [
            self.kernels.dense(q[None, :length], k[None, :length], v[None, :length])[0]
            for q, k, v, length in samples
        ]
        return stack_padded(rows)


def torch_attention(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    """torch's scaled dot-product attention on (B, T, N, K)."""
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
    """The backend of `--attn_mode` and `--split_attn` for a DiT on `device` (default: the CPU) in `dtype`.

    Raises HyimgError for an unknown mode, one that does not support the device, the dtype or training, and one whose
    package is missing, broken or too old.
    """
    if mode in ("torch", "sdpa"):
        return AttentionBackend(Kernels("torch", torch_attention), split)
    if mode not in PACKAGES:
        raise HyimgError(f"unknown attention mode `{mode}`", hint=did_you_mean(mode, MODES) or "use `torch`")
    device = device or torch.device("cpu")
    return AttentionBackend(load_kernels(mode, device=device, dtype=dtype, training=training), split)


def bind_lengths(backend: AttentionBackend, lengths: Sequence[int], num_tokens: int) -> Attend:
    """Attention for a batch whose samples have `lengths` real tokens out of `num_tokens`, with merged heads.

    Without padding the backend gets no lengths, and uses its fastest kernel.
    """
    is_padded = any(length != num_tokens for length in lengths)

    def attend(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        return backend(q_BTNK, k_BTNK, v_BTNK, lengths if is_padded else None).flatten(2)

    return attend
