"""Checks a model file by its header alone: its kind, name layout, sizes, and every tensor. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from hyimg.checkpoints.architecture import DiTArch, Shapes, VAEArch
from hyimg.checkpoints.fp8_format import (
    E4M3,
    Fp8Tensors,
    is_fp8,
    refuse_lost_scales,
    refuse_other_recipes,
    scale_problems,
    split_scales,
    with_scale_file,
)
from hyimg.checkpoints.model_files import KIND_NAMES, ModelKind, identify
from hyimg.checkpoints.names import Source, dit_key_map, dit_shapes, vae_key_map
from hyimg.checkpoints.safetensors_file import Checkpoint, TensorInfo
from hyimg.errors import HyimgError, first_few

Arch = TypeVar("Arch", DiTArch, VAEArch)

_MAX_LISTED = 10
_WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
# fp8 files carry scales that only the loader of their own tool knows
_ENCODER_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class OpenedModel(Generic[Arch]):
    """A checkpoint whose header was read and understood; its tensors under their original names.

    - `key_map`: the source of each tensor in the file; `shapes`: its shape
    - `problems`: a sentence for each tensor that lacks a part
    - `scales`: the name, in the file, of the scales of each fp8 weight that has some
    - `quantization`: how fp8 weights are stored, for messages; None for a file without
    - `checkpoint`: the files to read, including a separate file of scales
    """

    arch: Arch
    key_map: Mapping[str, Source]
    shapes: Shapes
    problems: Mapping[str, str]
    scales: Mapping[str, str]
    quantization: str | None
    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.checkpoint.path


def open_dit(path: str | os.PathLike[str], *, mmap: bool = True) -> OpenedModel[DiTArch]:
    """Opens a DiT file or folder; `mmap` False reads tensors instead of mapping the file.

    Raises `HyimgError` for a file that cannot be read or is of another kind, for weights that are neither
    floating-point numbers of 16 bits or more nor a known form of fp8 (`hyimg.checkpoints.fp8_format`), and, in
    one list, for missing, unknown and misshapen tensors.
    """
    opened = _open(Checkpoint.open(path, mmap=mmap), "dit", dit_key_map, DiTArch.from_shapes)
    require_fit(opened, dit_shapes(opened.arch))
    return opened


def open_vae(path: str | os.PathLike[str], *, mmap: bool = True) -> OpenedModel[VAEArch]:
    """Opens a VAE, which is never fp8. Raises as `open_dit`, but checks only the tensors that set a size.

    `hyimg.model.loading.check_vae` checks the others too.
    """
    return _open(Checkpoint.open(path, mmap=mmap), "vae", vae_key_map, VAEArch.from_shapes)


def require_fit(opened: OpenedModel[Arch], expected: Shapes) -> None:
    """Raises one HyimgError for all missing, misshapen and unknown tensors of a model with the `expected` shapes."""
    shapes, problems = opened.shapes, dict(opened.problems)
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            problems[name] = f"`{name}` has the shape {list(shapes[name])} instead of {list(shape)}"
        elif name not in shapes:
            problems.setdefault(name, f"`{name}` is missing")
    problems.update({name: f"`{name}` is not known" for name in shapes if name not in expected})
    if problems:
        raise HyimgError(
            f"the tensors of `{opened.path}` do not fit its architecture: {_listed(problems.values())}",
            hint="the file is incomplete or of another model; download it again",
        )


def _listed(problems: Iterable[str]) -> str:
    return first_few(list(problems), limit=_MAX_LISTED, separator="; ")


def _open(
    checkpoint: Checkpoint,
    kind: Literal["dit", "vae"],
    map_keys: Callable[[Collection[str]], dict[str, Source]],
    read_arch: Callable[[Shapes], Arch],
) -> OpenedModel[Arch]:
    found = identify(checkpoint.tensors)
    if found != kind:
        raise HyimgError(
            f"`{checkpoint.path}` is {KIND_NAMES[found]}, not {KIND_NAMES[kind]}",
            hint=f"give a HunyuanImage-2.1 checkpoint to `--{kind}`",
        )
    checkpoint = with_scale_file(checkpoint)
    found_fp8 = split_scales(checkpoint.tensors) if kind == "dit" and is_fp8(checkpoint.tensors) else None
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
        also = f"; {_listed(problems.values())}" if problems else ""
        raise HyimgError(f"`{checkpoint.path}`: {error.message}{also}", hint=error.hint) from None
    return OpenedModel(
        arch,
        key_map,
        shapes,
        problems,
        found_fp8.scales if found_fp8 else {},
        found_fp8.quantization if found_fp8 else None,
        checkpoint,
    )


def _require_floats(checkpoint: Checkpoint, names: Iterable[str], *, allows_fp8: bool) -> None:
    """Refuses quantised, integer and boolean weights."""
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
            f"`{name}` in `{checkpoint.path}` has the dtype {dtype}; weights must be "
            f"{', '.join(_WEIGHT_DTYPES[:-1])} or {_WEIGHT_DTYPES[-1]}",
            hint="the file is quantised or damaged; give the bf16 or fp16 file of this model",
        )


def _fp8_problems(
    checkpoint: Checkpoint, key_map: Mapping[str, Source], found: Fp8Tensors
) -> Iterator[tuple[str, str]]:
    """(original name, sentence) for bad scales, and for tensors with parts in fp8 and parts that are not."""
    tensors = checkpoint.tensors
    problems = scale_problems(tensors, found)

    def scale_shape(part: str) -> tuple[int, ...]:
        return tensors[found.scales[part]].shape if part in found.scales else ()

    for name, source in key_map.items():
        yield from [(name, problems[part]) for part in source.parts if part in problems][:1]
        dtypes = {tensors[part].dtype for part in source.parts if part in tensors}
        if E4M3 in dtypes and len(dtypes) > 1:
            yield name, f"only some of the parts of `{name}` are {E4M3}"
        blocks = {shape[1] for part in source.parts if len(shape := scale_shape(part)) == 3}
        if len(blocks) > 1:
            yield name, f"the parts of `{name}` have scales for blocks of different sizes"


def _original_shapes(checkpoint: Checkpoint, key_map: Mapping[str, Source]) -> tuple[Shapes, dict[str, str]]:
    """Shapes by original name, and a problem for each tensor that lacks a part."""
    file_shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    shapes, problems = {}, {}
    for name, source in key_map.items():
        absent = [part for part in source.parts if part not in file_shapes]
        if absent:
            problems[name] = f"`{absent[0]}` is missing"
        else:
            shapes[name] = source.shape(file_shapes)
    return shapes, problems


def refuse_other_kind(path: Path, tensors: Mapping[str, TensorInfo], wanted: ModelKind) -> None:
    """Raises `HyimgError` for the tensors of another kind of model."""
    kind = identify(tensors)
    if kind != wanted:
        raise HyimgError(f"`{path}` is {KIND_NAMES[kind]}, not {KIND_NAMES[wanted]}")


def check_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorInfo],
    *,
    model: str,
) -> None:
    """Raises one `HyimgError` that lists every missing, misshapen, unknown or fp8 tensor of a text encoder.

    `expected` maps names to shapes; `found` are the tensors of the file that this encoder would read.
    """
    problems = [f"`{name}` is missing" for name in expected if name not in found]
    for name, info in found.items():
        if name not in expected:
            problems.append(f"`{name}` is not known")
        elif info.shape != expected[name]:
            problems.append(f"`{name}` has the shape {list(info.shape)}, not {list(expected[name])}")
        elif info.dtype not in _ENCODER_DTYPES:
            problems.append(f"`{name}` is stored as {info.dtype}")
    if problems:
        raise HyimgError(
            f"`{path}` does not fit as {model}: {_listed(problems)}",
            hint="use the bf16 or fp16 release of this file, unchanged",
        )
