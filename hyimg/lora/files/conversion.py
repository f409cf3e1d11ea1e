"""LoRA files: saving a trained one, reading any, converting one into another, merging several.

Conversions import torch only where values have to be computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from hyimg.cache.atomic import require_file_name
from hyimg.checkpoints.safetensors_file import DTYPES
from hyimg.checkpoints.safetensors_writer import OutputTensor, write_lora
from hyimg.errors import HyimgError, did_you_mean
from hyimg.lora.files.foreign import METADATA_KEY, config_file, what_is_unmapped
from hyimg.lora.files.formats import FORMATS, Format, lora_name, parse_key
from hyimg.lora.files.rewriting import finite_chunks, not_finite, rewrite, tensor_bytes
from hyimg.lora.files.stored import LoRAFile, adapter_of

if TYPE_CHECKING:
    import torch

    from hyimg.lora.adapter import LoRA
    from hyimg.lora.lycoris import LoHa, LoKr

_OTHER_WAY = {
    "comfy": "`--reverse` converts it to the reference tool's format",
    "kohya": "without `--reverse` it is converted to ComfyUI's format",
}
_RANKS = ("ss_network_dim", "ss_network_alpha")
MERGED_FROM = "hyimg_merged_from"
"""The metadata key of a merged file: a JSON list of the files' names and weights."""


@dataclass(frozen=True)
class Conversion:
    """The result of `convert` or `merge`.

    `source_format` is the detected one, None for another tool's names or several files; `unmapped` are the tensors
    that were skipped, `skipped` says what they are; `warnings` are sentences about the strength of the sources;
    `errors` is the relative error of each module that `max_rank` changed, in the Frobenius norm, and `error` that of
    all of them together (None: nothing was compressed).
    """

    source_format: str | None
    target_format: str
    num_modules: int
    unmapped: tuple[str, ...] = ()
    skipped: str = ""
    warnings: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str = "comfy",
    max_rank: int | None = None,
    allow_partial: bool = False,
) -> Conversion:
    """Writes the LoRA `src` in another format; `to` is a name of `formats.FORMATS`.

    Each module's update (alpha/rank * up @ down) is preserved, bit for bit where only names change, unless its rank
    exceeds `max_rank`. The metadata is kept, with new hashes. Tensors are streamed, so memory does not grow with the
    file.

    Raises:
        HyimgError: what `LoRAFile.open` refuses, a file that already has that format, values that are not finite,
            a target that cannot hold what the file has, `dst` that is `src` or cannot be written.
    """
    src, dst = Path(src), Path(dst)
    format = _format(to)
    file = LoRAFile.open(src, allow_partial=allow_partial)
    _check_destination([file.path], dst, format)
    if file.formats == (to,) and max_rank is None:
        raise HyimgError(
            f"`{src}` is already in {format.title}, so there is nothing to convert", hint=_OTHER_WAY.get(to)
        )
    return _write([(file, 1.0)], dst, dict(file.header.metadata) or None, format, max_rank)


def merge(
    files: Sequence[tuple[Path, float]],
    dst: str | os.PathLike[str],
    *,
    to: str = "kohya",
    max_rank: int | None = None,
    allow_partial: bool = False,
) -> Conversion:
    """Writes the sum of LoRA files in any formats, each times its weight, as one file.

    Exact: a module's rank is the sum of its ranks in the files, unless that exceeds `max_rank`. Metadata that all
    files share is kept.

    Raises:
        HyimgError: as `convert`, and for files for models of different sizes, or a DoRA, LoHa or LoKr that cannot be
            added.
    """
    dst, format = Path(dst), _format(to)
    sources = [(LoRAFile.open(path, allow_partial=allow_partial), weight) for path, weight in files]
    _check_destination([file.path for file, _ in sources], dst, format)
    first = sources[0][0]
    for file, _ in sources[1:]:
        if (file.hidden, file.mlp_hidden) != (first.hidden, first.mlp_hidden):
            raise HyimgError(
                f"`{file.path}` is for a model of width {file.hidden}, but `{first.path}` for one of "
                f"width {first.hidden}",
                hint="merge LoRAs of one model",
            )
    shared = set.intersection(*({*file.header.metadata.items()} for file, _ in sources))
    metadata = {key: value for key, value in first.header.metadata.items() if (key, value) in shared}
    metadata[MERGED_FROM] = json.dumps([{"file": path.name, "weight": weight} for path, weight in files])
    return _write(sources, dst, _without_ranks(metadata), format, max_rank)


def _write(
    files: Sequence[tuple[LoRAFile, float]],
    dst: Path,
    metadata: dict[str, str] | None,
    format: Format,
    max_rank: int | None,
) -> Conversion:
    compression = None
    if format.metadata:
        metadata = {**(metadata or {}), **format.metadata}
    if metadata is not None:
        metadata.pop(METADATA_KEY, None)  # its alpha is in the tensors now
    if max_rank is not None:
        from hyimg.lora.files.compression import Compression

        compression = Compression(max_rank)
        metadata = metadata and _without_ranks(metadata)
        for file, _ in files:
            _require_finite(file)
    adapters = [replace(adapter, weight=weight) for file, weight in files for adapter in file.adapters]
    outputs = rewrite(adapters, format, compression=compression)
    # a power failure may cost the copy, never the source: no need to wait for the disk
    write_lora(dst, outputs, metadata, durable=False)
    return Conversion(
        next(iter(files[0][0].formats), None) if len(files) == 1 else None,
        format.name,
        len({name for file, _ in files for name in file.module_names}),
        tuple(name for file, _ in files for name in file.unmapped),
        "; ".join(what_is_unmapped(f.header.tensors, f.unmapped) for f, _ in files if f.unmapped),
        tuple(warning for file, _ in files for warning in file.warnings()),
        compression.errors if compression else {},
        compression.error if compression else None,
    )


def describe(done: Conversion) -> list[str]:
    """What to report about a conversion, a sentence a line; nothing if it was exact and complete."""
    lines = []
    if done.unmapped:
        lines.append(f"{len(done.unmapped)} tensors skipped, {done.skipped}")
    if done.error is not None:
        worst = max(done.errors, key=lambda name: done.errors[name])
        lines.append(
            f"rank reduced in {len(done.errors)} adapters: relative error {done.error:.3g} over all of them, "
            f"{done.errors[worst]:.3g} at worst (`{worst}`)"
        )
    return lines


def require_new_file(dst: Path, *, example: Path, overwrite: bool) -> None:
    """Raises HyimgError if `dst` is not a name for a LoRA file, or exists and may not be replaced."""
    if dst.suffix.lower() != ".safetensors":
        raise HyimgError(
            f"`{dst}` does not end with `.safetensors`, the format that is written",
            hint=f"give a file name such as `{example.stem}-converted.safetensors`",
        )
    require_file_name(dst)
    if dst.exists() and not overwrite:
        raise HyimgError(f"`{dst}` exists", hint="give another name, or `--overwrite`")


def _require_finite(file: LoRAFile) -> None:
    """Raises HyimgError for NaN and infinity: before a decomposition that takes minutes, not during it."""
    for adapter in file.adapters:
        for role in adapter.keys:
            for _ in finite_chunks(adapter, role, *adapter.bytes_of(role)):
                pass


def _without_ranks(metadata: Mapping[str, str]) -> dict[str, str]:
    """`Dynamic` is the reference tool's value for ranks that are read from the tensors."""
    return {key: "Dynamic" if key in _RANKS else value for key, value in metadata.items()}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise HyimgError(
            f"`{name}` is not a LoRA format; there are {', '.join(f'`{name}`' for name in FORMATS)}",
            hint=did_you_mean(name, FORMATS),
        )
    return FORMATS[name]


def save_lora(
    path: str | os.PathLike[str],
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    root: Path | None = None,
) -> None:
    """Saves a state of `AdapterNetwork.state()` atomically, with the reference tool's hashes.

    `dtype` converts every tensor, alpha too, as the reference tool does; None keeps each dtype. Magnitudes are not
    converted: rounded to bf16 they would change rows by more than training does. `root` as for `atomic_path`.
    """
    outputs = [
        output_tensor(name, tensor, None if name.endswith(".dora_scale") else dtype)
        for name, tensor in state.items()
    ]
    write_lora(path, outputs, metadata or {}, root=root)


def comfy_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, not copied, under ComfyUI's names.

    `state` has the reference tool's names, all of them of tensors that ComfyUI's format has a name for.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        key = parse_key(name)
        new_name = key.renamed(FORMATS["comfy"]) if key is not None else None
        assert new_name is not None, name
        renamed[new_name] = tensor
    return renamed


def output_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> OutputTensor:
    """A tensor to write, converted to `dtype` if that is given; it is converted and copied only as it is written.

    Raises HyimgError for a dtype that safetensors files do not have.
    """
    target = tensor.dtype if dtype is None else dtype
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
    if (dtype_name := names.get(str(target).removeprefix("torch."))) is None:
        raise HyimgError(f"`{name}` cannot be saved: it is {target}")

    def chunks() -> Iterator[memoryview]:
        yield tensor_bytes(tensor.detach().to(device="cpu", dtype=target))

    return OutputTensor(name, dtype_name, tuple(tensor.shape), tensor.numel() * target.itemsize, chunks)


def read_lora(
    path: str | os.PathLike[str] | LoRAFile, *, lycoris: bool = False, report_only: bool = False
) -> dict[str, torch.Tensor]:
    """A LoRA file in any format as the reference tool's names -> tensors in the file's dtype, on the CPU.

    `report_only` accepts NaN, infinity and magnitudes of every kind.

    Raises what `LoRAFile.open` raises, and `HyimgError` for NaN and infinity, a DoRA by columns, and for LoHa and
    LoKr unless `lycoris`.
    """
    tensors = _read_modules(path, lycoris=lycoris, report_only=report_only)
    return {f"{stem}.{end}": tensor for stem, own in tensors for end, tensor in own.items()}


def read_adapters(
    path: str | os.PathLike[str] | LoRAFile, *, report_only: bool = False
) -> Iterator[tuple[str, LoRA | LoHa | LoKr]]:
    """The adapters of a LoRA file in any format, frozen, in float32 on the CPU, by the model's own module names.

    One at a time is read. `report_only` accepts NaN and infinity, and omits magnitudes. Raises as `read_lora`.
    """
    file = path if isinstance(path, LoRAFile) else LoRAFile.open(path)
    names = {lora_name(name): name for name in file.module_names}
    for stem, tensors in _read_modules(file, lycoris=True, report_only=report_only):
        if report_only:
            tensors.pop("dora_scale", None)
        yield names[stem], adapter_of(tensors)


def _read_modules(
    path: str | os.PathLike[str] | LoRAFile, *, lycoris: bool, report_only: bool
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Of each module the reference tool's name, and its tensors by the ends of theirs."""
    import torch

    file = path if isinstance(path, LoRAFile) else LoRAFile.open(path)
    outputs = rewrite(file.adapters, FORMATS["kohya"], plain=not lycoris, finite=not report_only)
    for stem, own in groupby(outputs, lambda output: output.name.partition(".")[0]):
        tensors = {}
        for output in own:
            raw = bytearray().join(bytes(chunk) for chunk in output.chunks())
            dtype: torch.dtype = getattr(torch, DTYPES[output.dtype][1])
            end = output.name.partition(".")[2]
            shape = () if end == "alpha" else output.shape  # some tools write it as a list of one number
            tensors[end] = torch.frombuffer(raw, dtype=dtype).reshape(shape)
        if "dora_scale" in tensors and not report_only:
            tensors["dora_scale"] = _row_magnitude(file.path, stem, tensors)
        yield stem, tensors


def require_finite(path: str | os.PathLike[str], state: Mapping[str, torch.Tensor]) -> None:
    """Raises HyimgError for weights of `path` that are not finite."""
    for name, tensor in state.items():
        if not bool(tensor.float().isfinite().all()):  # torch has no isfinite for fp8
            raise not_finite(path, name)


def _row_magnitude(path: Path, stem: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A `dora_scale` as (O, 1); some tools write (O)."""
    magnitude, up = tensors["dora_scale"], tensors.get("lora_up.weight")
    if up is None:
        raise HyimgError(
            f"`{stem}.dora_scale` in `{path}` belongs to a LoHa or LoKr with DoRA, which is not supported",
            hint="only its names can be converted",
        )
    if magnitude.shape not in ((len(up),), (len(up), 1)):
        raise HyimgError(
            f"`{stem}.dora_scale` in `{path}` has the shape {list(magnitude.shape)}, but [{len(up)}, 1] is a norm for "
            "each output row",
            hint="a DoRA of input columns (LyCORIS with `wd_on_output=False`) is not supported",
        )
    return magnitude.reshape(len(up), 1)


def _check_destination(sources: Sequence[Path], dst: Path, format: Format) -> None:
    if dst.is_dir():
        raise HyimgError(f"`{dst}` is a folder", hint=f"give a file name, say `{dst / sources[0].name}`")
    for src in sources:
        if dst.exists() and dst.samefile(src):
            raise HyimgError(f"`{dst}` is the source file itself", hint="give another name for the result")
    config = config_file(dst)
    if config is not None and not format.has_alpha:
        raise HyimgError(
            f"`{dst}` would be read with the strength in `{config}`, but {format.title} has it in the weights",
            hint="write it to another folder",
        )
