"""LoRA files as a whole: saving a trained one, reading any, converting one into another.

No torch import is needed to convert; only `save_lora` and `read_lora` deal in tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hyimg.cache.atomic import require_file_name
from hyimg.errors import HyimgError, did_you_mean
from hyimg.lora.compression import Compression
from hyimg.lora.contents import PEFT_CONFIG, LoRAContents
from hyimg.lora.formats import FORMATS
from hyimg.lora.rewriting import rewrite
from hyimg.lora.values import read_values
from hyimg.lora.writer import OutputTensor, write_lora
from hyimg.model.safetensors_file import DTYPES

if TYPE_CHECKING:
    import torch


_OTHER_WAY = {
    "comfy": "`--reverse` makes the reference tool's form of it",
    "kohya": "without `--reverse` ComfyUI's form is made of it",
}
_DYNAMIC = ("ss_network_dim", "ss_network_alpha")
"""What the metadata say of the ranks, in the reference tool's word for ranks that are read from the tensors."""
MERGED_FROM = "hyimg_merged_from"
"""The metadata key of a merged file: a JSON list of the files' names and weights."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` or `merge` did.

    `source_format` is what was found, None for another tool's names or several files; `unmapped` are the
    tensors that were left out; `errors` the relative error of each module that `max_rank` changed, in the
    Frobenius norm, and `error` that of all of them together (None: nothing was compressed).
    """

    source_format: str | None
    target_format: str
    num_modules: int
    unmapped: tuple[str, ...] = ()
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

    Each module's delta (alpha/rank * up @ down) stays what it is, bit for bit where only names change, unless
    its rank is above `max_rank`. The metadata is kept, and its hashes are made anew. Tensors are streamed, so
    memory does not grow with the file.

    Raises:
        HyimgError: what `LoRAContents.open` refuses, a file that is in that format already, a target that
            cannot hold what the file has, `dst` that is `src` or cannot be written.
    """
    src, dst = Path(src), Path(dst)
    _require_format(to)
    contents = LoRAContents.open(src, allow_partial=allow_partial)
    _check_destination([src], dst)
    if contents.formats == (to,) and max_rank is None:
        raise HyimgError(
            f"`{src}` is in {FORMATS[to].title} already, so there is nothing to convert",
            hint=_OTHER_WAY.get(to),
        )
    metadata: dict[str, str] | None = dict(contents.header.metadata) or None
    return _write([(contents, 1.0)], dst, metadata, to=to, max_rank=max_rank)


def merge(
    files: Sequence[tuple[Path, float]],
    dst: str | os.PathLike[str],
    *,
    to: str = "kohya",
    max_rank: int | None = None,
    allow_partial: bool = False,
) -> Conversion:
    """Writes the sum of LoRA files in any formats, each times its weight, as one file.

    Exact: a module's rank is the sum of its ranks in the files, unless that is above `max_rank`. Metadata that
    all files share is kept.

    Raises:
        HyimgError: as `convert`, and for files for models of different widths, values that are not finite, or a
            DoRA, LoHa or LoKr that cannot be added.
    """
    dst = Path(dst)
    _require_format(to)
    sources = [(LoRAContents.open(path, allow_partial=allow_partial), weight) for path, weight in files]
    _check_destination([path for path, _ in files], dst)
    first = sources[0][0]
    for contents, _ in sources[1:]:
        if (contents.hidden, contents.mlp_hidden) != (first.hidden, first.mlp_hidden):
            raise HyimgError(
                f"`{contents.path}` is for a model of width {contents.hidden}, and `{first.path}` for one of "
                f"width {first.hidden}",
                hint="merge LoRAs of one model",
            )
    for contents, _ in sources:
        _require_finite_file(contents)
    shared = set.intersection(*({*contents.header.metadata.items()} for contents, _ in sources))
    metadata = {key: value for key, value in first.header.metadata.items() if (key, value) in shared}
    metadata[MERGED_FROM] = json.dumps([{"file": path.name, "weight": weight} for path, weight in files])
    _forget_ranks(metadata)
    return _write(sources, dst, metadata, to=to, max_rank=max_rank)


def _write(
    files: Sequence[tuple[LoRAContents, float]],
    dst: Path,
    metadata: dict[str, str] | None,
    *,
    to: str,
    max_rank: int | None,
) -> Conversion:
    format = FORMATS[to]
    if format.metadata:
        metadata = {**(metadata or {}), **format.metadata}
    if metadata is not None:
        metadata.pop(PEFT_CONFIG, None)  # its alpha is in the tensors now
        if max_rank is not None:
            _forget_ranks(metadata)
    compression = Compression(max_rank) if max_rank is not None else None
    outputs = rewrite(files, format, compression=compression)
    # A power cut may cost the copy, never the source: no need to wait for the disk
    write_lora(dst, outputs, metadata, durable=False)
    compressed = compression is not None and compression.squares
    return Conversion(
        next(iter(files[0][0].formats), None) if len(files) == 1 else None,
        to,
        len({module.name for contents, _ in files for module in contents.modules}),
        tuple(name for contents, _ in files for name in contents.unmapped),
        compression.errors if compression else {},
        compression.error if compression and compressed else None,
    )


def describe(done: Conversion) -> list[str]:
    """What a user should know of a conversion, a sentence a line; nothing where all is as it was."""
    lines = []
    if done.unmapped:
        names = ", ".join(f"`{name}`" for name in done.unmapped)
        lines.append(f"left out, of no module that a LoRA can stand on: {names}")
    if done.error is not None:
        worst = max(done.errors, key=lambda name: done.errors[name])
        lines.append(
            f"rank reduced in {len(done.errors)} adapters: relative error {done.error:.3g} over all of them, "
            f"{done.errors[worst]:.3g} at worst (`{worst}`)"
        )
    return lines


def require_new_file(dst: Path, *, example: Path, overwrite: bool) -> None:
    """Raises HyimgError where `dst` is no name for a LoRA file, or is there and not to be replaced."""
    if dst.suffix.lower() != ".safetensors":
        raise HyimgError(
            f"`{dst}` does not end with `.safetensors`, which is what is written",
            hint=f"give a file name, say `{example.stem}-converted.safetensors`",
        )
    require_file_name(dst)
    if dst.exists() and not overwrite:
        raise HyimgError(f"`{dst}` exists", hint="give another name, or `--overwrite`")


def _require_finite_file(contents: LoRAContents) -> None:
    """Before a sum: one bad file would spoil the good ones. A file that is only renamed is not looked at."""
    import numpy as np

    for module in contents.modules:
        for key in (key for piece in module.pieces for key in piece.keys.values()):
            if not np.isfinite(read_values(contents.header, key)).all():
                raise _not_finite(contents.path, key)


def _forget_ranks(metadata: dict[str, str]) -> None:
    metadata.update({key: "Dynamic" for key in _DYNAMIC if key in metadata})


def _require_format(name: str) -> None:
    if name not in FORMATS:
        raise HyimgError(
            f"`{name}` is not a LoRA format; there are {', '.join(f'`{name}`' for name in FORMATS)}",
            hint=did_you_mean(name, FORMATS),
        )


def save_lora(
    path: str | os.PathLike[str],
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Saves a state of `LoRANetwork.state()`, whole or not at all, with the reference tool's hashes.

    `dtype` converts every tensor, alpha too, as the reference tool does; None keeps each as it is. Magnitudes
    stay as they are: rounded to bf16 they would change rows by more than training does.
    """
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
    outputs = []
    for name, tensor in state.items():
        target = tensor.dtype if dtype is None or name.endswith(".dora_scale") else dtype
        num_bytes = tensor.numel() * target.itemsize
        dtype_name = names[str(target).removeprefix("torch.")]
        outputs.append(
            OutputTensor(name, dtype_name, tuple(tensor.shape), num_bytes, _TensorBytes(tensor, target))
        )
    write_lora(path, outputs, metadata or {})


def read_lora(
    file: str | os.PathLike[str] | LoRAContents, *, lycoris: bool = False
) -> dict[str, torch.Tensor]:
    """A LoRA file in any format as the reference tool's names -> tensors in the file's dtype, on the CPU.

    `file` is a path, or what was read of it already.

    Raises what `LoRAContents.open` raises, and `HyimgError` for a DoRA by columns, and for LoHa and LoKr,
    which only `lycoris` lets pass.
    """
    import torch

    state = {}
    contents = file if isinstance(file, LoRAContents) else LoRAContents.open(file)
    for output in rewrite([(contents, 1.0)], FORMATS["kohya"], plain=not lycoris):
        raw = bytearray().join(bytes(chunk) for chunk in output.chunks())
        dtype: torch.dtype = getattr(torch, DTYPES[output.dtype][1])
        # some tools write an alpha as a list of one number
        shape = () if output.name.endswith(".alpha") else output.shape
        state[output.name] = torch.frombuffer(raw, dtype=dtype).reshape(shape)
    for name in [name for name in state if name.endswith(".dora_scale")]:
        state[name] = _row_magnitude(contents.path, name, state)
    return state


def require_finite(path: str | os.PathLike[str], state: Mapping[str, torch.Tensor]) -> None:
    """Raises HyimgError for weights from `path` that are not finite."""
    for name, tensor in state.items():
        if not bool(tensor.float().isfinite().all()):  # fp8 does not know whether it is
            raise _not_finite(path, name)


def _not_finite(path: str | os.PathLike[str], name: str) -> HyimgError:
    return HyimgError(
        f"the LoRA file `{path}` holds NaN or infinity, in `{name}`",
        hint="its training went astray: take a file that was saved earlier",
    )


def _row_magnitude(
    path: str | os.PathLike[str], name: str, state: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A `dora_scale` as (O, 1); (O) is another way to write it."""
    magnitude = state[name]
    up = state.get(name.replace(".dora_scale", ".lora_up.weight"))
    if up is None:
        raise HyimgError(
            f"`{name}` in `{path}` is of a DoRA that is a LoHa or LoKr, which is not supported",
            hint="only a change of names can carry it",
        )
    num_rows = len(up)
    if magnitude.shape not in ((num_rows,), (num_rows, 1)):
        raise HyimgError(
            f"`{name}` in `{path}` has the shape {list(magnitude.shape)}, and [{num_rows}, 1] is a length for "
            "each output row",
            hint="a DoRA of input columns (LyCORIS with `wd_on_output=False`) is not supported",
        )
    return magnitude.reshape(num_rows, 1)


@dataclass(frozen=True)
class _TensorBytes:
    """The bytes of a tensor, made when they are written, so that one tensor at a time is copied."""

    tensor: torch.Tensor
    dtype: torch.dtype

    def __call__(self) -> Iterator[memoryview]:
        import torch

        flat = self.tensor.detach().to(device="cpu", dtype=self.dtype).contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _check_destination(sources: Sequence[Path], dst: Path) -> None:
    if dst.is_dir():
        raise HyimgError(f"`{dst}` is a folder", hint=f"give a file name, say `{dst / sources[0].name}`")
    for src in sources:
        if dst.exists() and dst.samefile(src):
            raise HyimgError(f"`{dst}` is the source file itself", hint="give another name for the result")
