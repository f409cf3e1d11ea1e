"""Builds DiTs and VAEs from checkpoints, or with random weights.

Errors are found in the header, before the first weight is read. A model is built on the meta device and filled
tensor by tensor, each converted and moved on the way, so that no second copy of the weights exists.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DiTArch, VAEArch
from hyimg.checkpoints.header_check import Arch, OpenedModel, open_dit, open_vae, require_fit
from hyimg.checkpoints.names import Source
from hyimg.checkpoints.safetensors_file import Checkpoint
from hyimg.model.dit import DiT
from hyimg.model.vae import VAE
from hyimg.randomness import keyed_generator


class WeightPlacement:
    """Where each tensor of a model goes while it is loaded, and in which dtype: here, all to one device.

    `hyimg.memory.dit_loader.DiTPlacement` also quantises, and keeps streamed weights in host memory.
    """

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.device = torch.device(device)
        self.dtype = dtype

    def read_on(self, name: str) -> torch.device:
        """The device to read a tensor (original name) to."""
        return self.device

    def put(self, model: nn.Module, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
        """Stores a tensor, in the file's dtype on the device of `read_on`, under its original name.

        An e4m3 tensor (O, I) may have a float32 `scale` of one value, (O, 1) or (O, I/K, 1). Here it is
        dequantised, to bfloat16 if no dtype was given.
        """
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = unscale(tensor, scale, self.dtype or torch.bfloat16)
        set_parameter(model, name, tensor.to(self.device, self.dtype))


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter by a frozen one of any dtype and device."""
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))


def unscale(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantises an e4m3 tensor with its scales, which are as in `WeightPlacement.put`."""
    values = tensor.to(dtype)
    if scale is not None:
        values.view(scale.numel(), -1).mul_(scale.view(-1, 1).to(dtype))
    return values


def check_vae(path: str | os.PathLike[str]) -> VAEArch:
    """The architecture of a VAE, from its header alone. Raises as `open_dit`."""
    return _empty_vae(open_vae(path)).arch


def load_dit(
    source: OpenedModel[DiTArch] | str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    placement: WeightPlacement | None = None,
    mmap: bool = True,
) -> DiT:
    """A frozen DiT from an opened checkpoint, or from a file or sharded folder. Raises as `open_dit`.

    Names may be original, ComfyUI's or diffusers'. `dtype` None keeps the file's. `placement` overrides
    device and dtype; `mmap` is for a path.
    """
    opened = source if isinstance(source, OpenedModel) else open_dit(source, mmap=mmap)
    with torch.device("meta"):
        model = DiT(opened.arch)
    _fill(model, opened, placement or WeightPlacement(device, dtype))
    return model


def read_dit_tensors(
    opened: OpenedModel[DiTArch], names: Iterable[str], *, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors of a DiT by their original names, without a model: in the file's dtype, fp8 as bfloat16."""
    for name in names:
        source = opened.key_map[name]
        tensor = _read(opened.checkpoint, source, torch.device(device))
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = unscale(tensor, _read_scale(opened, source, tensor.device), torch.bfloat16)
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
    """A frozen VAE with original or diffusers names. Raises as `check_vae`.

    `chunk_rows` as `VAE.set_chunk_rows`, `tile_size` as `VAE.set_tile_size`.
    """
    opened = open_vae(path, mmap=mmap)
    model = _empty_vae(opened)
    _fill(model, opened, WeightPlacement(device, dtype))
    model.set_chunk_rows(chunk_rows)
    model.set_tile_size(tile_size)
    return model


def _empty_vae(opened: OpenedModel[VAEArch]) -> VAE:
    """The VAE on the meta device; raises HyimgError if the checkpoint does not fit it."""
    with torch.device("meta"):
        model = VAE(opened.arch)
    require_fit(opened, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    return model


def _fill(model: nn.Module, opened: OpenedModel[Arch], placement: WeightPlacement) -> None:
    # A list: a placement may replace modules and add parameters on the way
    for name in [name for name, _ in model.named_parameters()]:
        source, device = opened.key_map[name], placement.read_on(name)
        tensor = _read(opened.checkpoint, source, device)
        placement.put(model, name, tensor, _read_scale(opened, source, device))
    model.eval()


def _read(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    parts = [checkpoint.read(part, device) for part in source.parts]
    return _swap(torch.cat(parts) if len(parts) > 1 else parts[0], source)


def _read_scale(opened: OpenedModel[Arch], source: Source, device: torch.device) -> Tensor | None:
    """The scales of a tensor for `WeightPlacement.put`, concatenated by rows like its parts; None without any."""
    checkpoint = opened.checkpoint
    names = [opened.scales.get(part) for part in source.parts]
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
    scale_OG = torch.cat(
        [scale.expand(rows, num_blocks) for scale, rows in zip(by_row, num_rows, strict=True)]
    )
    scale_OG = _swap(scale_OG, source).to(device)
    return scale_OG if num_blocks == 1 else scale_OG[..., None]


def _swap(tensor: Tensor, source: Source) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if source.swap_halves else tensor


# A random encoder's standard deviations would be near 1, and in the thousands for sharp images; a trained one's
# are small
_LOG_VARIANCE_BIAS = -20.0


def init_random(model: nn.Module, seed: int) -> None:
    """Fills a DiT or VAE in place, on any device but meta, with weights that depend only on (seed, name).

    Matrices keep the scale of their input, norms scale by about 1, and biases and modulation are not zero, so
    that outputs are of order 1 and gradients reach every Linear.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=keyed_generator(seed, name, "init"))
            parameter.copy_(_scaled(name, values))
        if isinstance(model, VAE):
            bias = model.encoder.conv_out.bias
            assert bias is not None
            bias[model.arch.latent_channels :] += _LOG_VARIANCE_BIAS


def _scaled(name: str, values: Tensor) -> Tensor:
    if values.ndim >= 2:
        return values / math.sqrt(values[0].numel())
    return 1 + 0.1 * values if "norm" in name and name.endswith(".weight") else 0.1 * values
