"""Checkpoints to models: all that can be wrong is found in the headers, before the first weight is read.

A model is built on the meta device and filled tensor by tensor, each converted and moved on the way, so that
no second copy of the weights ever exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hyimg.model.architecture import DiTArch, Shapes, VAEArch
from hyimg.model.dit import DiT
from hyimg.model.header_check import read_dit, read_vae, require_fit
from hyimg.model.keys import Source
from hyimg.model.safetensors_file import Checkpoint
from hyimg.model.vae import VAE

# (original name, tensor as stored in the model) -> the tensor to store
OnTensor = Callable[[str, Tensor], Tensor]


def check_dit(path: str | os.PathLike[str]) -> DiTArch:
    """The architecture of a DiT checkpoint, from its header alone.

    Raises `HyimgError` for a file that cannot be read or is something else, and for missing, surplus and
    misshapen tensors, all in one list.
    """
    return _plan_dit(Checkpoint.open(path))[0].arch


def check_vae(path: str | os.PathLike[str]) -> VAEArch:
    """The same for a VAE."""
    return _plan_vae(Checkpoint.open(path))[0].arch


def load_dit(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    on_tensor: OnTensor | None = None,
    mmap: bool = True,
) -> DiT:
    """A frozen DiT from a file or sharded folder in original, ComfyUI or diffusers names.

    `dtype` None keeps the file's. `on_tensor` sees each tensor on its device, in its dtype and under its
    original name, and returns what the model is to hold. Raises as `check_dit`.
    """
    checkpoint = Checkpoint.open(path, mmap=mmap)
    model, key_map = _plan_dit(checkpoint)
    _fill(model, checkpoint, key_map, torch.device(device), dtype, on_tensor)
    return model


def load_vae(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mmap: bool = True,
    chunk_rows: int | None = None,
) -> VAE:
    """A frozen VAE in original or diffusers names. `chunk_rows` as `VAE.set_chunk_rows`. Raises as `check_vae`."""
    checkpoint = Checkpoint.open(path, mmap=mmap)
    model, key_map = _plan_vae(checkpoint)
    _fill(model, checkpoint, key_map, torch.device(device), dtype, None)
    model.set_chunk_rows(chunk_rows)
    return model


def _plan_dit(checkpoint: Checkpoint) -> tuple[DiT, Mapping[str, Source]]:
    """The model on the meta device, and where each of its tensors comes from."""
    contents = read_dit(checkpoint)
    with torch.device("meta"):
        model = DiT(contents.arch)
    require_fit(checkpoint, contents, _shapes(model))
    return model, contents.key_map


def _plan_vae(checkpoint: Checkpoint) -> tuple[VAE, Mapping[str, Source]]:
    contents = read_vae(checkpoint)
    with torch.device("meta"):
        model = VAE(contents.arch)
    require_fit(checkpoint, contents, _shapes(model))
    return model, contents.key_map


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    key_map: Mapping[str, Source],
    device: torch.device,
    dtype: torch.dtype | None,
    on_tensor: OnTensor | None,
) -> None:
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        tensor = _read(checkpoint, key_map[name], device).to(dtype)
        if on_tensor is not None:
            tensor = on_tensor(name, tensor)
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))
    model.eval()


def _read(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    parts = [checkpoint.read(part, device) for part in source.parts]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    return torch.cat(tensor.chunk(2)[::-1]) if source.swap_halves else tensor
