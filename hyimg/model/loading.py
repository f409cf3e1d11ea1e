"""Checkpoints to models: all that can be wrong is found in the headers, before the first weight is read.

A model is built on the meta device and filled tensor by tensor, each converted and moved on the way, so that
no second copy of the weights ever exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hyimg.model.architecture import DiTArch, Shapes, VAEArch
from hyimg.model.dit import DiT
from hyimg.model.header_check import read_dit, read_vae, require_fit
from hyimg.model.keys import Source
from hyimg.model.safetensors_file import Checkpoint
from hyimg.model.vae import VAE


class Placement:
    """Where each tensor of a model goes while it is loaded, and in what form: here, onto one device.

    `hyimg.memory.placement` has the one that quantises and that puts streamed weights into host memory.
    """

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.device = torch.device(device)
        self.dtype = dtype

    def read_on(self, name: str) -> torch.device:
        """The device that the file's bytes of a tensor (original name) are read to."""
        return self.device

    def put(self, model: nn.Module, name: str, tensor: Tensor) -> None:
        """Stores a tensor under its original name; it comes in the file's dtype, on the device of `read_on`."""
        set_parameter(model, name, tensor.to(self.device, self.dtype))


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter, whatever its dtype and device were, by a frozen one."""
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))


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
    placement: Placement | None = None,
    mmap: bool = True,
) -> DiT:
    """A frozen DiT from a file or sharded folder in original, ComfyUI or diffusers names.

    `dtype` None keeps the file's. A `placement` takes the place of device and dtype. Raises as `check_dit`.
    """
    checkpoint = Checkpoint.open(path, mmap=mmap)
    model, key_map = _plan_dit(checkpoint)
    _fill(model, checkpoint, key_map, placement or Placement(device, dtype))
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
    _fill(model, checkpoint, key_map, Placement(device, dtype))
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
    model: nn.Module, checkpoint: Checkpoint, key_map: Mapping[str, Source], placement: Placement
) -> None:
    # A list: a placement may replace modules and add parameters on the way
    for name in [name for name, _ in model.named_parameters()]:
        placement.put(model, name, _read(checkpoint, key_map[name], placement.read_on(name)))
    model.eval()


def _read(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    parts = [checkpoint.read(part, device) for part in source.parts]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    return torch.cat(tensor.chunk(2)[::-1]) if source.swap_halves else tensor
