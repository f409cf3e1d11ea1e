"""Checkpoints to models: all that can be wrong is found in the headers, before the first weight is read.

A model is built on the meta device and filled tensor by tensor, each converted and moved on the way, so that
no second copy of the weights ever exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hyimg.model.architecture import DiTArch, Shapes, VAEArch
from hyimg.model.dit import DiT
from hyimg.model.header_check import Arch, Contents, read_dit, read_vae, require_fit
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

    def put(self, model: nn.Module, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
        """Stores a tensor under its original name; it comes in the file's dtype, on the device of `read_on`.

        A tensor in e4m3 may come with its `scale`: float32 with one value, (O, 1) or (O, I/K, 1). Here it
        becomes what it stands for, in bfloat16 where no dtype is asked for.
        """
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = unscale(tensor, scale, self.dtype or torch.bfloat16)
        set_parameter(model, name, tensor.to(self.device, self.dtype))


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter, whatever its dtype and device were, by a frozen one."""
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))


def unscale(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What an e4m3 tensor and its scales (as `Placement.put` has them) stand for."""
    values = tensor.to(dtype)
    if scale is not None:
        values.view(scale.numel(), -1).mul_(scale.view(-1, 1).to(dtype))
    return values


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
    model, contents = _plan_dit(checkpoint)
    _fill(model, contents, placement or Placement(device, dtype))
    return model


def read_dit_tensors(
    path: str | os.PathLike[str], names: Iterable[str], *, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a DiT file by their original names, one at a time: in the file's dtype, fp8 as bfloat16.

    For looking at weights without a model. Raises as `check_dit`, when the first is asked for.
    """
    contents = _plan_dit(Checkpoint.open(path))[1]
    for name in names:
        source = contents.key_map[name]
        tensor = _read(contents.checkpoint, source, torch.device(device))
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = unscale(tensor, _read_scale(contents, source, tensor.device), torch.bfloat16)
        yield name, tensor


def load_vae(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mmap: bool = True,
    chunk_rows: int | None = None,
    tile_size: int | None = None,
) -> VAE:
    """A frozen VAE in original or diffusers names. Raises as `check_vae`.

    `chunk_rows` as `VAE.set_chunk_rows`, `tile_size` as `VAE.set_tile_size`.
    """
    checkpoint = Checkpoint.open(path, mmap=mmap)
    model, contents = _plan_vae(checkpoint)
    _fill(model, contents, Placement(device, dtype))
    model.set_chunk_rows(chunk_rows)
    model.set_tile_size(tile_size)
    return model


def _plan_dit(checkpoint: Checkpoint) -> tuple[DiT, Contents[DiTArch]]:
    """The model on the meta device, and what the checkpoint has for it."""
    contents = read_dit(checkpoint)
    with torch.device("meta"):
        model = DiT(contents.arch)
    require_fit(checkpoint, contents, _shapes(model))
    return model, contents


def _plan_vae(checkpoint: Checkpoint) -> tuple[VAE, Contents[VAEArch]]:
    contents = read_vae(checkpoint)
    with torch.device("meta"):
        model = VAE(contents.arch)
    require_fit(checkpoint, contents, _shapes(model))
    return model, contents


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _fill(model: nn.Module, contents: Contents[Arch], placement: Placement) -> None:
    # A list: a placement may replace modules and add parameters on the way
    for name in [name for name, _ in model.named_parameters()]:
        source, device = contents.key_map[name], placement.read_on(name)
        tensor = _read(contents.checkpoint, source, device)
        placement.put(model, name, tensor, _read_scale(contents, source, device))
    model.eval()


def _read(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    parts = [checkpoint.read(part, device) for part in source.parts]
    return _swap(torch.cat(parts) if len(parts) > 1 else parts[0], source)


def _read_scale(contents: Contents[Arch], source: Source, device: torch.device) -> Tensor | None:
    """The scales of a tensor, as `Placement.put` takes them; joined by rows as its parts are."""
    checkpoint = contents.checkpoint
    names = [contents.scales.get(part) for part in source.parts]
    if not any(names):
        return None
    scales = [torch.ones(1) if name is None else checkpoint.read(name).float() for name in names]
    if len(scales) == 1 and scales[0].numel() == 1:
        return scales[0].view(1).to(device)
    num_rows = [checkpoint.tensors[part].shape[0] for part in source.parts]
    by_row = [
        scale.view(rows if scale.numel() > 1 else 1, -1) for scale, rows in zip(scales, num_rows, strict=True)
    ]
    num_blocks = max(scale.shape[1] for scale in by_row)
    joined = torch.cat([scale.expand(rows, num_blocks) for scale, rows in zip(by_row, num_rows, strict=True)])
    joined = _swap(joined, source).to(device)
    return joined if num_blocks == 1 else joined[..., None]


def _swap(tensor: Tensor, source: Source) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if source.swap_halves else tensor
