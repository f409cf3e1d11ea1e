"""Whether a checkpoint's header has the tensors that an encoder reads. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hyimg.errors import HyimgError
from hyimg.model.safetensors_file import KIND_NAMES, Kind, TensorInfo, identify

MAX_LISTED = 10

# fp8 files carry scales that only the loader of their own tool knows
READABLE_DTYPES = ("BF16", "F16", "F32")


def refuse_other_kind(path: Path, tensors: Mapping[str, TensorInfo], wanted: Kind) -> None:
    """Raises `HyimgError` where the names are those of another model."""
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
    """Raises one `HyimgError` that lists every tensor that is missing, misshapen, unknown or in fp8.

    `expected` gives shapes by name; `found` are the tensors of the file that this encoder would read.
    """
    problems = [f"`{name}` is missing" for name in expected if name not in found]
    for name, info in found.items():
        if name not in expected:
            problems.append(f"`{name}` is not known")
        elif info.shape != expected[name]:
            problems.append(f"`{name}` has the shape {list(info.shape)}, not {list(expected[name])}")
        elif info.dtype not in READABLE_DTYPES:
            problems.append(f"`{name}` is stored as {info.dtype}")
    if problems:
        raise HyimgError(
            f"`{path}` does not fit as {model}: {_enumerate(problems)}",
            hint="use the bf16 or fp16 release of this file, unchanged",
        )


def _enumerate(problems: Iterable[str]) -> str:
    listed = list(problems)
    rest = len(listed) - MAX_LISTED
    return "; ".join(listed[:MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
