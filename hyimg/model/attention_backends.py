"""The attention kernels of other packages: what each needs, how it is called, and what is said where it cannot be.

Signatures and layouts, as the packages' own sources give them:

    flash-attn     flash_attn_func(q, k, v) on (B, T, N, K); flash_attn_varlen_func on packed (tokens, N, K)
                   with int32 boundaries. 2.7 is the first whose kernels are torch operators, which keeping
                   attention under gradient checkpointing relies on
    xformers       memory_efficient_attention(q, k, v, attn_bias) on (B, T, N, K), packed tokens in a batch of
                   one with a BlockDiagonalMask. 0.0.27 is the first that makes the mask on a device
    sageattention  sageattn(q, k, v, tensor_layout="NHD") on (B, T, N, K), without gradients

Shapes: B batch, T tokens, N heads, K head size, P tokens of all samples one after another
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
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.model.padding import pack, unpack

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
Ragged = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


class Kernels(NamedTuple):
    """A package's attention: its name for the log, and what it computes."""

    name: str
    dense: Dense
    """(q_BTNK, k_BTNK, v_BTNK) -> (B, T, N, K), every token real."""
    ragged: Ragged | None = None
    """The same with the samples' lengths, the longest of which is T; None: a sample at a time."""


@dataclass(frozen=True)
class _Package:
    """What a backend needs before it can be used."""

    module: str
    minimum: str
    install: str
    build: Callable[[ModuleType, str], Kernels]
    takes_float32: bool = False
    trains: bool = True


def load_kernels(mode: str, *, device: torch.device, dtype: torch.dtype, training: bool) -> Kernels:
    """The kernels of a `--attn_mode` in `PACKAGES`.

    Raises HyimgError where the run cannot use them, or the package is missing, broken or too old.
    """
    package = PACKAGES[mode]
    if training and not package.trains:
        raise HyimgError(
            f"`--attn_mode {mode}` cannot train: its kernels have no backward pass",
            hint="use `torch`, `flash` or `xformers` to train",
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


def _import(mode: str, package: _Package) -> tuple[ModuleType, str]:
    name = package.module
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a binary for another torch raises
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
    """The numbers that a version starts with: 2.7.4 of 2.7.4.post1+cu126."""
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
    """Whether torch was told to prefer reproducible kernels; flash-attn's backward pass has a slower one."""
    return torch.are_deterministic_algorithms_enabled()


@functools.lru_cache(maxsize=8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sample begins and the last one ends, int32 (B+1).

    Remembered, since every block of a forward asks for the same, and each transfer lets the host wait.
    """
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
