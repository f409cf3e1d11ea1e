"""A LoRA file's header as adapters of this model's modules: the common form between all formats.

Only the header is read here, so that everything wrong with a file is found before a tensor is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hyimg.errors import HyimgError
from hyimg.lora.formats import (
    EXTRA_ROLES,
    Key,
    Target,
    Width,
    matching_formats,
    parse_key,
)
from hyimg.model.safetensors_file import DTYPES, KIND_NAMES, Header, identify, read_header

# Models whose LoRAs have the very same names in ComfyUI's or diffusers' form, told apart by their width
FOREIGN_WIDTHS = {3072: "FLUX.1 and HunyuanVideo"}
DEFAULT_MLP_RATIO = 4
PEFT_CONFIG = "lora_adapter_metadata"
"""The metadata key under which diffusers writes PEFT's configuration (rank and alpha) as JSON."""


@dataclass(frozen=True)
class Piece:
    """One adapter: its tensors' names in the file by role. `part` is its row range, None for all rows."""

    part: int | None
    keys: Mapping[str, str]


@dataclass(frozen=True)
class AdaptedModule:
    """A module of the model with what the file holds for it: one piece, or one for each row range."""

    target: Target
    index: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """The model's own name: `double_blocks.0.img_attn_qkv`."""
        return f"{self.target.block}.{self.index}.{self.target.original}"

    @property
    def is_whole(self) -> bool:
        return self.pieces[0].part is None


@dataclass(frozen=True)
class LoRAContents:
    """What a LoRA file holds. `formats` are those whose names it has exactly, none for another tool's."""

    header: Header
    modules: tuple[AdaptedModule, ...]
    formats: tuple[str, ...]
    hidden: int
    mlp_hidden: int

    @staticmethod
    def open(path: str | os.PathLike[str]) -> LoRAContents:
        """Reads and checks a LoRA file in any format, or in a mixture of them.

        Raises `HyimgError` for what `read_header` refuses, a file that is no LoRA, names that are of no
        module of this model, an adapter without both its halves, and shapes that do not fit this model.
        """
        header = read_header(Path(path))
        keys = _parse_keys(header)
        modules = _group(header, keys)
        hidden, mlp_hidden = _check_shapes(header, modules)
        return LoRAContents(header, modules, tuple(matching_formats(keys)), hidden, mlp_hidden)

    @property
    def path(self) -> Path:
        return self.header.path

    def width(self, width: Width) -> int:
        """A width of a `Target` in units of this file's model."""
        return width[0] * self.hidden + width[1] * self.mlp_hidden

    def shape(self, key: str) -> tuple[int, ...]:
        return self.header.tensors[key].shape

    def peft_scale(self, key: str, rank: int) -> float:
        """The scale of an adapter that has no alpha tensor.

        alpha/rank of PEFT's configuration in the metadata (alpha/sqrt(rank) with `use_rslora`), and 1
        without one: diffusion-pipe and PEFT by hand fold it into the weights.
        """
        config = self._peft_config
        module = key.partition(".lora_")[0]
        own = [alpha for name, alpha in config.get("alpha_pattern", {}).items() if module.endswith(name)]
        alpha = own[0] if own else config.get("lora_alpha")
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    @cached_property
    def _peft_config(self) -> dict[str, Any]:
        text = self.header.metadata.get(PEFT_CONFIG)
        try:
            config = json.loads(text) if text is not None else {}
            return {name.removeprefix("transformer."): value for name, value in config.items()}
        except (ValueError, AttributeError):
            raise HyimgError(f"`{PEFT_CONFIG}` in the metadata of `{self.path}` cannot be parsed") from None


def _parse_keys(header: Header) -> list[Key]:
    kind = identify(header.tensors)
    if kind != "lora":
        raise HyimgError(f"`{header.path}` is not a LoRA but {KIND_NAMES[kind]}")
    keys, unknown = [], []
    for text, info in header.tensors.items():
        if info.dtype not in DTYPES:
            raise HyimgError(
                f"`{text}` in `{header.path}` has the dtype {info.dtype}, which is not supported"
            )
        key = parse_key(text)
        # an alpha may be a whole number: it is read as a number, and never trained
        if key and key.role != "alpha" and not info.dtype.startswith(("F", "BF")):
            raise HyimgError(
                f"`{text}` in `{header.path}` has the dtype {info.dtype}, and the weights of a LoRA are "
                "floating-point numbers",
                hint="save the LoRA in bf16, fp16 or fp32",
            )
        keys.append(key) if key else unknown.append(text)
    if unknown:
        shown = ", ".join(f"`{text}`" for text in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        whole = "no LoRA of HunyuanImage-2.1" if not keys else "not wholly a LoRA of HunyuanImage-2.1"
        raise HyimgError(
            f"`{header.path}` is {whole}: {len(unknown)} of its {len(header.tensors)} tensors are of no "
            f"module that a LoRA can stand on: {shown}{more}"
        )
    return sorted(keys, key=lambda key: (key.target.block, key.index, key.part or 0, key.text))


def _group(header: Header, keys: list[Key]) -> tuple[AdaptedModule, ...]:
    pieces: dict[tuple[str, int | None], dict[str, str]] = {}
    modules: dict[str, Key] = {}
    for key in keys:
        modules.setdefault(key.module, key)
        roles = pieces.setdefault((key.module, key.part), {})
        if key.role in roles:
            raise HyimgError(
                f"`{header.path}` holds one tensor twice: `{roles[key.role]}` and `{key.text}` are both the "
                f"{key.role} of `{key.module}`"
            )
        roles[key.role] = key.text
    adapted = []
    for name, key in modules.items():
        own = tuple(Piece(part, roles) for (module, part), roles in pieces.items() if module == name)
        if len(own) > 1 and any(piece.part is None for piece in own):
            raise HyimgError(
                f"`{header.path}` holds two adapters of `{name}`, one whole and one split by rows"
            )
        for piece in own:
            _check_complete(header, name, piece)
        adapted.append(AdaptedModule(key.target, key.index, own))
    return tuple(adapted)


def _check_complete(header: Header, module: str, piece: Piece) -> None:
    missing = {"down", "up"} - piece.keys.keys()
    if missing and not (EXTRA_ROLES & piece.keys.keys() - {"dora_scale"}):
        raise HyimgError(
            f"`{header.path}` is incomplete: `{next(iter(piece.keys.values()))}` is there and the "
            f"{' and '.join(sorted(missing))} of `{module}` is not"
        )


def _plain_pieces(modules: tuple[AdaptedModule, ...]) -> Iterator[tuple[AdaptedModule, Piece]]:
    for module in modules:
        for piece in module.pieces:
            if "down" in piece.keys:
                yield module, piece


def _check_shapes(header: Header, modules: tuple[AdaptedModule, ...]) -> tuple[int, int]:
    """The hidden and the MLP width of the model that the file was trained on, once every shape fits them."""
    widths: list[tuple[str, Width, int]] = []
    for module, piece in _plain_pieces(modules):
        down, up = (header.tensors[piece.keys[role]].shape for role in ("down", "up"))
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
            raise HyimgError(
                f"`{header.path}` is no LoRA of HunyuanImage-2.1: the adapter of `{module.name}` has the "
                f"shapes {list(down)} and {list(up)}, which do not make a product of matrices"
            )
        target = module.target
        widths.append((module.name, target.in_width, down[1]))
        widths.append(
            (module.name, target.out_width if piece.part is None else target.part_widths[piece.part], up[0])
        )
    hidden = next((size // width[0] for _, width, size in widths if width[0] and not width[1]), 0)
    mlp = next(
        (size - width[0] * hidden for _, width, size in widths if width[1]), hidden * DEFAULT_MLP_RATIO
    )
    for name, width, size in widths:
        if size != width[0] * hidden + width[1] * mlp:
            raise HyimgError(
                f"`{header.path}` is no LoRA of HunyuanImage-2.1: `{name}` is {size} wide where the width "
                f"{hidden} of its neighbours asks for {width[0] * hidden + width[1] * mlp}"
            )
    if hidden in FOREIGN_WIDTHS:
        raise HyimgError(
            f"`{header.path}` is no LoRA of HunyuanImage-2.1 (3584 wide): it is {hidden} wide, as those of "
            f"{FOREIGN_WIDTHS[hidden]}, whose modules have the same names"
        )
    return hidden, mlp
