"""`--torch_compile`: the blocks' halves before and after attention as compiled graphs.

Attention between them runs as it is: it is a kernel of its own anyway, the lengths of a batch's samples stay out
of the graphs, and so do checkpointing, streaming and offloading, which act around a block or around its attention.

Numbers of tokens and of images are symbols in a graph, and a LoRA's multiplier is one of its inputs, so that a
graph serves all blocks of a kind, streamed or not, at all bucket sizes. What asks for another: one image against
several, with gradients or without, a first block (whose input needs none), other ranks of adapters.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from hyimg.errors import HyimgError
from hyimg.model.blocks import DoubleBlock, SingleBlock
from hyimg.model.dit import DiT

# Graphs for one half of a kind of block before torch gives up: LoRA ranks by pattern may ask for many
_MAX_GRAPHS = 64

_HINT = "leave `--torch_compile` out, or "


def compile_blocks(dit: DiT) -> None:
    """Compiles both halves of each block, when they first run. Adapters may come and go afterwards."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), _MAX_GRAPHS))
    for block in dit.blocks:
        assert isinstance(block, DoubleBlock | SingleBlock)
        for half in ("before_attention", "after_attention"):
            setattr(block, half, torch.compile(getattr(block, half), dynamic=True, fullgraph=True))


def require_compiler(device: torch.device) -> None:
    """Raises HyimgError where torch cannot compile for a device: said before a run, not at its first step."""
    if device.type == "cuda":
        _require_triton(device)
        if sys.platform != "win32":  # where Triton brings its own
            _require_program("CC", ("gcc", "clang"), "C")
    elif device.type == "cpu":
        _require_program("CXX", _CPP_COMPILERS.get(sys.platform, ("g++",)), "C++")
    else:
        raise HyimgError(
            f"`--torch_compile` cannot compile for `{device.type}`", hint="leave `--torch_compile` out"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise HyimgError(
            "`--torch_compile` needs Python's header files, and `Python.h` is not there",
            hint=f"{_HINT}install them (on Debian and Ubuntu `apt install python3-dev`)",
        )


_CPP_COMPILERS = {"darwin": ("clang++",), "win32": ("cl",)}


def _require_triton(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 0):
        raise HyimgError(
            f"`--torch_compile` needs a GPU of compute capability 7.0 or later, and this one has "
            f"{capability[0]}.{capability[1]}",
            hint="leave `--torch_compile` out",
        )
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        raise HyimgError(
            "`--torch_compile` needs the package `triton`, which is not installed",
            hint=f"{_HINT}run `pip install {package}`",
        )


def _require_program(variable: str, names: tuple[str, ...], language: str) -> None:
    """A compiler, named by an environment variable or found under one of the usual names."""
    if chosen := os.environ.get(variable):
        names = (chosen.split()[0],)
    if not any(shutil.which(name) for name in names):
        missing = " or ".join(f"`{name}`" for name in names)
        raise HyimgError(
            f"`--torch_compile` needs a {language} compiler, and there is no {missing}",
            hint=f"{_HINT}install one (on Debian and Ubuntu `apt install g++`), or name it in `{variable}`",
        )
