"""`--torch_compile`: compiles the blocks' parts before and after attention.

Attention between them is not compiled: it is a separate kernel anyway, and so the lengths of a batch's samples stay
out of the graphs, like checkpointing, streaming and offloading, which wrap a block or its attention.

Numbers of tokens and images are symbolic and a LoRA's multiplier is an input, so that a graph serves all blocks of a
kind, streamed or not, at all bucket sizes. It is recompiled for one image instead of several, with or without
gradients, for the first block (whose input needs none), and for other ranks of adapters.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from hyimg.errors import HyimgError
from hyimg.model.blocks import DoubleBlock, SingleBlock
from hyimg.model.dit import DiT

# Graphs for one part of a kind of block before torch gives up; LoRA ranks by pattern may need many
_MAX_GRAPHS = 64

_HINT = "remove `--torch_compile`, or "


def compile_blocks(dit: DiT) -> None:
    """Compiles both parts of each block when they first run. Adapters may be attached or detached afterwards."""
    use_private_cache()
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), _MAX_GRAPHS))
    for block in dit.blocks:
        assert isinstance(block, DoubleBlock | SingleBlock)
        for half in ("before_attention", "after_attention"):
            setattr(block, half, torch.compile(getattr(block, half), dynamic=True, fullgraph=True))


def require_compiler(device: torch.device) -> None:
    """Raises HyimgError if torch cannot compile for a device, before a run and not in its first step."""
    use_private_cache()
    if device.type == "cuda":
        _require_triton(device)
        if sys.platform != "win32":  # where Triton includes one
            _require_program("CC", ("gcc", "clang"), "C")
    elif device.type == "cpu":
        _require_program("CXX", _CPP_COMPILERS.get(sys.platform, ("g++",)), "C++")
    else:
        raise HyimgError(
            f"`--torch_compile` cannot compile for `{device.type}`", hint="remove `--torch_compile`"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise HyimgError(
            "`--torch_compile` needs Python's header files, and `Python.h` is missing",
            hint=f"{_HINT}install them (on Debian and Ubuntu `apt install python3-dev`)",
        )


def use_private_cache() -> None:
    """Makes torch store compiled code in a folder that only this user can write; call before compiling.

    Torch's default is a fixed name in the temporary folder, from which it loads libraries: another user who creates
    it first could put code there. Raises HyimgError if another user has created ours.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ or not hasattr(os, "getuid"):
        return
    folder = Path(tempfile.gettempdir()) / f"torchinductor-hyimg-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise HyimgError(
            f"another user can write to `{folder}`, where compiled code would be stored",
            hint="remove it, or set the environment variable `TORCHINDUCTOR_CACHE_DIR` to another folder",
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


_CPP_COMPILERS = {"darwin": ("clang++",), "win32": ("cl",)}


def _require_triton(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        raise HyimgError(
            f"`--torch_compile` needs a GPU of compute capability 7.0 or later, and this one has "
            f"{capability[0]}.{capability[1]}",
            hint="remove `--torch_compile`",
        )
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        raise HyimgError(
            "`--torch_compile` needs the package `triton`, which is not installed",
            hint=f"{_HINT}run `pip install {package}`",
        )


def _require_program(variable: str, names: tuple[str, ...], language: str) -> None:
    """Raises HyimgError if no compiler is set by the environment variable or found under a usual name."""
    if chosen := os.environ.get(variable):
        names = (chosen.split()[0],)
    if not any(shutil.which(name) for name in names):
        missing = " or ".join(f"`{name}`" for name in names)
        raise HyimgError(
            f"`--torch_compile` needs a {language} compiler, and {missing} was not found",
            hint=f"{_HINT}install one (on Debian and Ubuntu `apt install g++`), or set `{variable}`",
        )
