"""A LoRA file's header as adapters of this model's modules: the common form between all formats.

Only the header is read here, so that everything wrong with a file is found before a tensor is.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hyimg.errors import HyimgError
from hyimg.lora.foreign import looks_like
from hyimg.lora.formats import Key, Target, Width, matching_formats, parse_key
from hyimg.lora.pieces import Piece
from hyimg.model.safetensors_file import DTYPES, KIND_NAMES, Header, identify, read_header

# Models whose LoRAs have the very same names in ComfyUI's or diffusers' form, told apart by their width
FOREIGN_WIDTHS = {3072: "FLUX.1 and HunyuanVideo"}
DEFAULT_MLP_RATIO = 4
PEFT_CONFIG = "lora_adapter_metadata"
"""The metadata key under which diffusers writes PEFT's configuration (rank and alpha) as JSON."""


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
    """What a LoRA file holds. `formats` are those whose names it has exactly, none for another tool's.

    `unmapped` are the tensors that stand on no module a LoRA of this model can, where that was allowed.
    """

    header: Header
    modules: tuple[AdaptedModule, ...]
    formats: tuple[str, ...]
    hidden: int
    mlp_hidden: int
    unmapped: tuple[str, ...] = ()

    @staticmethod
    def open(path: str | os.PathLike[str], *, allow_partial: bool = False) -> LoRAContents:
        """Reads and checks a LoRA file in any format, or in a mixture of them.

        `allow_partial` puts the tensors of other modules into `unmapped` instead of refusing the file.

        Raises `HyimgError` for what `read_header` refuses, a file that is no LoRA, names that are of no
        module of this model, an adapter without all its parts, and shapes that do not fit this model.
        """
        header = read_header(Path(path))
        keys, unmapped = _parse_keys(header)
        modules = _group(header, keys)
        hidden, mlp_hidden = _check_shapes(header, modules)
        if unmapped and not allow_partial:
            raise _partly_foreign(header, unmapped)
        formats = () if unmapped else tuple(matching_formats(keys))
        return LoRAContents(header, modules, formats, hidden, mlp_hidden, unmapped)

    @property
    def path(self) -> Path:
        return self.header.path

    def width(self, width: Width) -> int:
        """A width of a `Target` in units of this file's model."""
        return width[0] * self.hidden + width[1] * self.mlp_hidden

    def rows(self, target: Target, part: int | None) -> tuple[int, int]:
        """The rows of a module's weight that are its `part`; all of them for None."""
        if part is None:
            return 0, self.width(target.out_width)
        start = sum(self.width(width) for width in target.part_widths[:part])
        return start, start + self.width(target.part_widths[part])

    def shape(self, key: str) -> tuple[int, ...]:
        return self.header.tensors[key].shape

    def peft_scale(self, key: str, rank: int) -> float:
        """The scale of an adapter that has no alpha tensor.

        alpha/rank of PEFT's configuration in the metadata (alpha/sqrt(rank) with `use_rslora`), and 1
        without one: diffusion-pipe and PEFT by hand fold it into the weights.
        """
        config = self._peft_config
        module = re.split(r"[._]lora[._]", key)[0]
        own = [alpha for name, alpha in config.get("alpha_pattern", {}).items() if _names(name, module)]
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


def _names(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's `alpha_pattern` names a module: its whole name, or the end of it after a dot."""
    name = pattern.removeprefix("^")
    return module == name or module.endswith(f".{name}")


def _parse_keys(header: Header) -> tuple[list[Key], tuple[str, ...]]:
    """The keys in the order of the model's blocks, and the names that are none."""
    if not header.tensors:
        raise HyimgError(f"`{header.path}` holds no tensors", hint="copy or download it again")
    kind = identify(header.tensors)
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
        if key and key.role == "alpha" and math.prod(info.shape) != 1:
            raise HyimgError(
                f"`{text}` in `{header.path}` has the shape {list(info.shape)}, and an alpha is one number"
            )
        keys.append(key) if key else unknown.append(text)
    if not keys:
        raise (
            _foreign(header)
            if kind == "lora"
            else HyimgError(f"`{header.path}` is not a LoRA but {KIND_NAMES[kind]}")
        )
    ordered = sorted(keys, key=lambda key: (key.target.block, key.index, key.part or 0, key.text))
    return ordered, tuple(unknown)


def _foreign(header: Header) -> HyimgError:
    model = looks_like(header.tensors)
    likeness = f" but of {model}, by its names" if model else ""
    return HyimgError(
        f"`{header.path}` is no LoRA of HunyuanImage-2.1{likeness}: none of its {len(header.tensors)} tensors "
        f"is of a module that a LoRA can stand on: {_listed(list(header.tensors))}"
    )


def _partly_foreign(header: Header, unmapped: Sequence[str]) -> HyimgError:
    return HyimgError(
        f"`{header.path}` is not wholly a LoRA of HunyuanImage-2.1: {len(unmapped)} of its "
        f"{len(header.tensors)} tensors are of no module that a LoRA can stand on: {_listed(unmapped)}",
        hint="`hyimg convert-comfy --allow_partial` makes a file without them",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _group(header: Header, keys: list[Key]) -> tuple[AdaptedModule, ...]:
    pieces: dict[str, dict[int | None, dict[str, str]]] = {}
    modules: dict[str, Key] = {}
    for key in keys:
        modules.setdefault(key.module, key)
        roles = pieces.setdefault(key.module, {}).setdefault(key.part, {})
        if key.role in roles:
            raise HyimgError(
                f"`{header.path}` holds one tensor twice: `{roles[key.role]}` and `{key.text}` are both the "
                f"{key.role} of `{key.module}`"
            )
        roles[key.role] = key.text
    adapted = []
    for name, key in modules.items():
        own = tuple(Piece(part, roles) for part, roles in pieces[name].items())
        if len(own) > 1 and any(piece.part is None for piece in own):
            raise HyimgError(
                f"`{header.path}` holds two adapters of `{name}`, one whole and one split by rows"
            )
        for piece in own:
            piece.require_complete(header, name)
        adapted.append(AdaptedModule(key.target, key.index, own))
    return tuple(adapted)


def _check_shapes(header: Header, modules: tuple[AdaptedModule, ...]) -> tuple[int, int]:
    """The hidden and the MLP width of the model that the file was trained on, once every shape fits them."""
    widths: list[tuple[str, Width, int]] = []
    for module in modules:
        for piece in module.pieces:
            rows, columns = piece.shape(header, module.name)
            target = module.target
            out_width = target.out_width if piece.part is None else target.part_widths[piece.part]
            widths += [(module.name, target.in_width, columns), (module.name, out_width, rows)]
    hidden = next((size // width[0] for _, width, size in widths if width[0] and not width[1]), 0)
    mlp = next(
        (size - width[0] * hidden for _, width, size in widths if width[1]), hidden * DEFAULT_MLP_RATIO
    )
    if hidden in FOREIGN_WIDTHS:
        raise HyimgError(
            f"`{header.path}` is no LoRA of HunyuanImage-2.1 (3584 wide): it is {hidden} wide, as those of "
            f"{FOREIGN_WIDTHS[hidden]}, whose modules have the same names"
        )
    for name, width, size in widths:
        if size != width[0] * hidden + width[1] * mlp:
            raise HyimgError(
                f"`{header.path}` is no LoRA of HunyuanImage-2.1: `{name}` is {size} wide where the width "
                f"{hidden} of its neighbours asks for {width[0] * hidden + width[1] * mlp}"
            )
    return hidden, mlp
