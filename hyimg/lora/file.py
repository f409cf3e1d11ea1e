"""LoRA files as a whole: saving a trained one, reading any, converting one into another.

No torch import is needed to convert; only `save_lora` and `read_lora` deal in tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyimg.errors import HyimgError, did_you_mean
from hyimg.lora.contents import PEFT_CONFIG, LoRAContents
from hyimg.lora.formats import FORMATS
from hyimg.lora.rewriting import rewrite
from hyimg.lora.writer import OutputTensor, write_lora
from hyimg.model.safetensors_file import DTYPES

if TYPE_CHECKING:
    import torch


_OTHER_WAY = {
    "comfy": "`--reverse` makes the reference tool's form of it",
    "kohya": "without `--reverse` ComfyUI's form is made of it",
}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the format that it found, None for another tool's names, and how many modules."""

    source_format: str | None
    target_format: str
    num_modules: int


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, to: str = "comfy") -> Conversion:
    """Writes the LoRA `src` in another format; `to` is a name of `formats.FORMATS`.

    Each module's delta (alpha/rank * up @ down) stays what it is, bit for bit where only names change.
    The metadata is kept, and its hashes are made anew. Tensors are streamed, so memory does not grow with
    the file.

    Raises:
        HyimgError: what `LoRAContents.open` refuses, a file that is in that format already, a target that
            cannot hold what the file has, `dst` that is `src` or cannot be written.
    """
    src, dst = Path(src), Path(dst)
    if to not in FORMATS:
        raise HyimgError(
            f"`{to}` is not a LoRA format; there are {', '.join(f'`{name}`' for name in FORMATS)}",
            hint=did_you_mean(to, FORMATS),
        )
    contents = LoRAContents.open(src)
    _check_destination(src, dst)
    if contents.formats == (to,):
        raise HyimgError(
            f"`{src}` is in {FORMATS[to].title} already, so there is nothing to convert",
            hint=_OTHER_WAY.get(to),
        )
    metadata: dict[str, str] | None = dict(contents.header.metadata) or None
    if FORMATS[to].metadata:
        metadata = {**(metadata or {}), **FORMATS[to].metadata}
    if metadata is not None:
        metadata.pop(PEFT_CONFIG, None)  # its alpha is in the tensors now
    # A power cut may cost the copy, never the source: no need to wait for the disk
    write_lora(dst, rewrite(contents, FORMATS[to]), metadata, durable=False)
    return Conversion(next(iter(contents.formats), None), to, len(contents.modules))


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


def read_lora(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """A LoRA file in any format as the reference tool's names -> tensors in the file's dtype, on the CPU.

    Raises what `LoRAContents.open` raises, and `HyimgError` for LoHa, LoKr, and a DoRA by columns.
    """
    import torch

    state = {}
    for output in rewrite(LoRAContents.open(path), FORMATS["kohya"], plain=True):
        raw = bytearray().join(bytes(chunk) for chunk in output.chunks())
        dtype: torch.dtype = getattr(torch, DTYPES[output.dtype][1])
        state[output.name] = torch.frombuffer(raw, dtype=dtype).reshape(output.shape)
    for name in [name for name in state if name.endswith(".dora_scale")]:
        state[name] = _row_magnitude(path, name, state)
    return state


def require_finite(path: str | os.PathLike[str], state: Mapping[str, torch.Tensor]) -> None:
    """Raises HyimgError for weights from `path` that are not finite."""
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise HyimgError(
                f"the LoRA file `{path}` holds NaN or infinity, in `{name}`",
                hint="its training went astray: take a file that was saved earlier",
            )


def _row_magnitude(
    path: str | os.PathLike[str], name: str, state: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A `dora_scale` as (O, 1); (O) is another way to write it."""
    magnitude = state[name]
    num_rows = len(state[name.replace(".dora_scale", ".lora_up.weight")])
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


def _check_destination(src: Path, dst: Path) -> None:
    if dst.is_dir():
        raise HyimgError(f"`{dst}` is a folder", hint=f"give a file name, say `{dst / src.name}`")
    if dst.exists() and dst.samefile(src):
        raise HyimgError(f"`{dst}` is the source file itself", hint="give another name for the result")
