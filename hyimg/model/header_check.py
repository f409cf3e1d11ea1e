"""What a DiT or VAE file is, from its header alone and without torch: kind, name layout, sizes, every tensor.

`hyimg.model.loading` makes the same checks against the model itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from hyimg.errors import HyimgError
from hyimg.model.architecture import DiTArch, Shapes, VAEArch
from hyimg.model.dit_shapes import dit_shapes
from hyimg.model.fp8_format import (
    E4M3,
    Fp8Tensors,
    is_fp8,
    refuse_lost_scales,
    refuse_other_recipes,
    scale_problems,
    tell_apart,
    with_scale_file,
)
from hyimg.model.keys import Source, dit_key_map, vae_key_map
from hyimg.model.safetensors_file import KIND_NAMES, Checkpoint, identify

Arch = TypeVar("Arch", DiTArch, VAEArch)

_MAX_LISTED = 10
_WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Contents(Generic[Arch]):
    """What a checkpoint holds, under original names.

    `key_map` says where each tensor comes from, `shapes` what shape it has, and `problems` has a sentence for
    each that cannot be made because a part is missing. `scales` gives, for the fp8 weights of the file that have
    some, the name of their scales in it, and `quantization` how its weights are stored (None: as they are).
    `checkpoint` is what to read: the one asked about, with a file of scales where there is one.
    """

    arch: Arch
    key_map: Mapping[str, Source]
    shapes: Shapes
    problems: Mapping[str, str]
    scales: Mapping[str, str]
    quantization: str | None
    checkpoint: Checkpoint


def read_dit_arch(path: str | os.PathLike[str]) -> DiTArch:
    """The sizes of a DiT file or folder.

    Raises `HyimgError` for what cannot be read or is something else, and for missing, surplus and misshapen
    tensors, as `loading.check_dit` does with the model itself.
    """
    checkpoint = Checkpoint.open(path)
    contents = read_dit(checkpoint)
    require_fit(checkpoint, contents, dit_shapes(contents.arch))
    return contents.arch


def read_vae_arch(path: str | os.PathLike[str]) -> VAEArch:
    """The sizes of a VAE; of its tensors only those that tell a size are checked (`loading.check_vae`: all)."""
    return read_vae(Checkpoint.open(path)).arch


def read_dit(checkpoint: Checkpoint) -> Contents[DiTArch]:
    """The contents of a DiT checkpoint.

    Raises `HyimgError` for another kind of file, weights that are neither floating-point numbers of 16 bits or
    more nor fp8 as `hyimg.model.fp8_format` knows it, and a tensor missing that tells a size.
    """
    return _read(checkpoint, "dit", dit_key_map, DiTArch.from_shapes)


def read_vae(checkpoint: Checkpoint) -> Contents[VAEArch]:
    """The contents of a VAE checkpoint, which is never fp8. Raises as `read_dit`."""
    return _read(checkpoint, "vae", vae_key_map, VAEArch.from_shapes)


def require_fit(checkpoint: Checkpoint, contents: Contents[Arch], expected: Shapes) -> None:
    """Raises one error for everything that a model of the `expected` shapes misses, or has no place for."""
    shapes, problems = contents.shapes, dict(contents.problems)
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            problems[name] = f"`{name}` has the shape {list(shapes[name])} instead of {list(shape)}"
        elif name not in shapes:
            problems.setdefault(name, f"`{name}` is missing")
    problems.update({name: f"`{name}` is not known" for name in shapes if name not in expected})
    if problems:
        raise HyimgError(
            f"the tensors of `{checkpoint.path}` do not fit its architecture: "
            f"{list_problems(problems.values())}",
            hint="the file is incomplete or of another model; download it again",
        )


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
    checkpoint = with_scale_file(checkpoint)
    found_fp8 = tell_apart(checkpoint.tensors) if kind == "dit" and is_fp8(checkpoint.tensors) else None
    names = found_fp8.weights if found_fp8 else list(checkpoint.tensors)
    _require_floats(checkpoint, names, allows_fp8=kind == "dit")
    key_map = map_keys(names)
    shapes, problems = _original_shapes(checkpoint, key_map)
    if found_fp8:
        refuse_other_recipes(checkpoint)
        refuse_lost_scales(checkpoint, found_fp8)
        problems.update(_fp8_problems(checkpoint, key_map, found_fp8))
    try:
        arch = read_arch(shapes)
    except HyimgError as error:
        also = f"; {list_problems(problems.values())}" if problems else ""
        raise HyimgError(f"`{checkpoint.path}`: {error.message}{also}", hint=error.hint) from None
    return Contents(
        arch,
        key_map,
        shapes,
        problems,
        found_fp8.scales if found_fp8 else {},
        found_fp8.quantization if found_fp8 else None,
        checkpoint,
    )


def _require_floats(checkpoint: Checkpoint, names: Iterable[str], *, allows_fp8: bool) -> None:
    """Refuses weights of types that do not hold the numbers themselves: quantised, integer, boolean."""
    for name in names:
        dtype = checkpoint.tensors[name].dtype
        if dtype in _WEIGHT_DTYPES or (allows_fp8 and dtype == E4M3):
            continue
        if dtype.startswith("F8"):
            reason = f"of fp8 only {E4M3} is read" if allows_fp8 else "this model is not read in fp8"
            raise HyimgError(
                f"`{name}` in `{checkpoint.path}` is {dtype}: {reason}",
                hint="give the bf16 or fp16 file of this model",
            )
        raise HyimgError(
            f"`{name}` in `{checkpoint.path}` has the dtype {dtype}, and weights are {_listed_dtypes()}",
            hint="the file is quantised or damaged; give the bf16 or fp16 file of this model",
        )


def _fp8_problems(
    checkpoint: Checkpoint, key_map: Mapping[str, Source], found: Fp8Tensors
) -> Iterator[tuple[str, str]]:
    """(original name, sentence) for what is wrong with scales, and for tensors of which a part is fp8."""
    tensors = checkpoint.tensors
    problems = scale_problems(tensors, found)

    def scale_shape(part: str) -> tuple[int, ...]:
        return tensors[found.scales[part]].shape if part in found.scales else ()

    for name, source in key_map.items():
        yield from [(name, problems[part]) for part in source.parts if part in problems][:1]
        dtypes = {tensors[part].dtype for part in source.parts if part in tensors}
        if E4M3 in dtypes and len(dtypes) > 1:
            yield name, f"`{name}` is made of parts of which only some are {E4M3}"
        blocks = {shape[1] for part in source.parts if len(shape := scale_shape(part)) == 3}
        if len(blocks) > 1:
            yield name, f"`{name}` is made of parts with scales for blocks of different sizes"


def _listed_dtypes() -> str:
    return f"{', '.join(_WEIGHT_DTYPES[:-1])} or {_WEIGHT_DTYPES[-1]}"


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
