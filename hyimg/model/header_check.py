"""What a DiT or VAE file is, from its header alone and without torch: kind, name layout, sizes.

`hyimg.model.loading` goes on from here and checks every single tensor against the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from hyimg.errors import HyimgError
from hyimg.model.architecture import DiTArch, Shapes, VAEArch
from hyimg.model.keys import Source, dit_key_map, vae_key_map
from hyimg.model.safetensors_file import KIND_NAMES, Checkpoint, identify

Arch = TypeVar("Arch", DiTArch, VAEArch)

_MAX_LISTED = 10


@dataclass(frozen=True)
class Contents(Generic[Arch]):
    """What a checkpoint holds, under original names.

    `key_map` says where each tensor comes from, `shapes` what shape it has, and `problems` has a sentence for
    each that cannot be made because a part is missing.
    """

    arch: Arch
    key_map: Mapping[str, Source]
    shapes: Shapes
    problems: Mapping[str, str]


def read_dit_arch(path: str | os.PathLike[str]) -> DiTArch:
    """The sizes of a DiT file or folder.

    Raises `HyimgError` for what cannot be read, is something else, or lacks a tensor that tells a size; use
    `loading.check_dit` to have every tensor checked.
    """
    return read_dit(Checkpoint.open(path)).arch


def read_vae_arch(path: str | os.PathLike[str]) -> VAEArch:
    """The same for a VAE."""
    return read_vae(Checkpoint.open(path)).arch


def read_dit(checkpoint: Checkpoint) -> Contents[DiTArch]:
    """The contents of a DiT checkpoint. Raises as `read_dit_arch`."""
    return _read(checkpoint, "dit", dit_key_map, DiTArch.from_shapes)


def read_vae(checkpoint: Checkpoint) -> Contents[VAEArch]:
    """The contents of a VAE checkpoint. Raises as `read_dit_arch`."""
    return _read(checkpoint, "vae", vae_key_map, VAEArch.from_shapes)


def list_problems(problems: Collection[str]) -> str:
    """The first ten, and how many more there are."""
    listed = "; ".join(list(problems)[:_MAX_LISTED])
    more = len(problems) - _MAX_LISTED
    return f"{listed}; and {more} more" if more > 0 else listed


def _read(
    checkpoint: Checkpoint,
    kind: Literal["dit", "vae"],
    map_keys: Callable[[Collection[str]], dict[str, Source]],
    read_arch: Callable[[Shapes], Arch],
) -> Contents[Arch]:
    found = identify(checkpoint.tensors)
    if found != kind:
        raise HyimgError(
            f"`{checkpoint.path}` is {KIND_NAMES[found]}, not {KIND_NAMES[kind]}",
            hint=f"give a HunyuanImage-2.1 checkpoint to `--{kind}`",
        )
    key_map = map_keys(checkpoint.tensors)
    shapes, problems = _original_shapes(checkpoint, key_map)
    try:
        arch = read_arch(shapes)
    except HyimgError as error:
        also = f"; {list_problems(problems.values())}" if problems else ""
        raise HyimgError(f"`{checkpoint.path}`: {error.message}{also}", hint=error.hint) from None
    return Contents(arch, key_map, shapes, problems)


def _original_shapes(checkpoint: Checkpoint, key_map: Mapping[str, Source]) -> tuple[Shapes, dict[str, str]]:
    """Shapes by original name of what can be made, and a problem for what lacks a part."""
    file_shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    shapes, problems = {}, {}
    for name, source in key_map.items():
        absent = [part for part in source.parts if part not in file_shapes]
        if absent:
            problems[name] = f"`{absent[0]}` is missing"
        else:
            shapes[name] = source.shape(file_shapes)
    return shapes, problems
