"""A LoRA file of any format as adapters of this model's modules.

Only the header is read, so that every problem of a file is found before a tensor is, and torch is not imported
unless values are needed.

    lora   alpha/rank * up @ down                                       Hu et al., arXiv 2106.09685
    loha   alpha/rank * (w1_a @ w1_b) * (w2_a @ w2_b), by element       Hyeon-Woo et al., arXiv 2108.06098
    lokr   alpha/rank * kron(w1, w2), each full or a product w_a @ w_b  Yeh et al., arXiv 2309.14859

The names and scales of the last two are LyCORIS's (`lycoris/modules/loha.py`, `lokr.py`), which ComfyUI reads in the
same way. A LoKr of two full factors has no rank and the scale 1, whatever its alpha.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hyimg.checkpoints.model_files import KIND_NAMES, identify
from hyimg.checkpoints.names import Width
from hyimg.checkpoints.safetensors_file import DTYPES, Header, read_header
from hyimg.checkpoints.safetensors_writer import stored_chunks
from hyimg.config.documents import parse_json
from hyimg.errors import HyimgError, first_few
from hyimg.lora.files.foreign import (
    PeftConfig,
    looks_like,
    other_kinds,
    strength_unknown,
    weights_file,
    what_is_unmapped,
)
from hyimg.lora.files.formats import LOHA_ROLES, LOKR_ROLES, TensorKey, matching_formats, parse_key

if TYPE_CHECKING:
    import torch

    from hyimg.lora.adapter import LoRA
    from hyimg.lora.lycoris import LoHa, LoKr

KIND_TITLES: Mapping[str, str] = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}

_LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# Models whose LoRAs have the same names in ComfyUI's or diffusers' format, recognised by their width
_FOREIGN_WIDTHS = {3072: "FLUX.1 and HunyuanVideo"}
_DEFAULT_MLP_RATIO = 4


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter in a file, multiplied by `weight`, on a module or on one row range of its weight.

    `keys` are the parsed tensor names by role. `widths` are the hidden and the MLP size of the file's model, `peft`
    is the configuration that has the scale if there is no alpha.
    """

    header: Header
    keys: Mapping[str, TensorKey]
    widths: tuple[int, int] = (0, 0)
    peft: PeftConfig | None = None
    weight: float = 1.0

    @property
    def key(self) -> TensorKey:
        """One of its keys: the module, the part, and a name to show."""
        return next(iter(self.keys.values()))

    @property
    def kind(self) -> Literal["lora", "loha", "lokr"]:
        if self.keys.keys() & LOHA_ROLES:
            return "loha"
        return "lokr" if self.keys.keys() & LOKR_ROLES else "lora"

    @property
    def matrices(self) -> tuple[str, ...]:
        """The roles of the matrices that are multiplied."""
        return tuple(role for role in self.keys if role not in ("alpha", "magnitude"))

    @property
    def is_dora(self) -> bool:
        return "magnitude" in self.keys

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None for a LoKr of two full factors, which is not scaled."""
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if role in self.keys:
                return self.shape_of(role)[0]
        return None

    @property
    def scale(self) -> float:
        """weight * alpha/rank. Without alpha PEFT's configuration has it; without that it is 1.

        Raises `HyimgError` for an alpha that is not finite.
        """
        if "alpha" not in self.keys:
            return self.weight * (1.0 if self.peft is None else self.peft.scale(self.key.stem, self.rank))
        if self.rank is None:  # LyCORIS ignores its alpha
            return self.weight
        alpha = float(self.tensor("alpha"))
        if not math.isfinite(alpha):
            raise HyimgError(f"`{self.keys['alpha'].text}` in `{self.header.path}` is not one finite number")
        return self.weight * alpha / self.rank

    @property
    def in_features(self) -> int:
        return self._size(self.key.linear.in_width)

    @property
    def rows(self) -> tuple[int, int]:
        """The rows of the module's weight that it changes, half open."""
        return self.rows_of(self.key.part)

    def rows_of(self, part: int | None) -> tuple[int, int]:
        """The rows of the module's weight that are its `part`; all of them for None."""
        linear = self.key.linear
        if part is None:
            return 0, self._size(linear.out_width)
        start = sum(self._size(width) for width in linear.part_widths[:part])
        return start, start + self._size(linear.part_widths[part])

    def _size(self, width: Width) -> int:
        return width[0] * self.widths[0] + width[1] * self.widths[1]

    def dtype_of(self, role: str) -> str:
        """The dtype of a tensor, as the file names it."""
        return self.header.tensors[self.keys[role].text].dtype

    def shape_of(self, role: str) -> tuple[int, ...]:
        return self.header.tensors[self.keys[role].text].shape

    def bytes_of(self, role: str, rows: tuple[int, int] | None = None) -> tuple[int, int]:
        """Where the file has a tensor, or some of its rows: the first byte and the one after the last."""
        info = self.header.tensors[self.keys[role].text]
        start = self.header.data_start + info.start
        if rows is None or not info.shape:
            return start, start + info.end - info.start
        row_bytes = (info.end - info.start) // info.shape[0]
        return start + rows[0] * row_bytes, start + rows[1] * row_bytes

    def tensor(self, role: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor on the CPU in the file's dtype and shape, or some of its rows; an alpha as a scalar."""
        import torch

        chunks = stored_chunks(self.header.path, *self.bytes_of(role, rows))
        raw = bytearray().join(bytes(chunk) for chunk in chunks)
        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype_of(role)][1])
        shape = () if role == "alpha" else (-1, *self.shape_of(role)[1:])  # some tools write alpha as a list
        return torch.frombuffer(raw, dtype=dtype).reshape(shape)

    def load(self) -> LoRA | LoHa | LoKr:
        """The adapter, scaled, with frozen float64 parameters on the CPU; without magnitudes."""
        import torch

        names = {"down": "lora_down.weight", "up": "lora_up.weight"}
        adapter = adapter_of(
            {names.get(role, role): self.tensor(role) for role in self.matrices}, torch.float64
        )
        adapter.alpha = self.scale * adapter.rank
        return adapter

    def shape(self) -> tuple[int, int]:
        """(O, I) of the update. Raises `HyimgError` where the tensors' shapes do not form a product."""
        if self.kind == "lora":
            return self._product("up", "down")
        if self.kind == "loha":
            first, second = (self._product(f"hada_{w}_a", f"hada_{w}_b") for w in ("w1", "w2"))
            if first != second:
                raise self._misshapen(_LOHA_PARTS)
            return first
        (rows_1, columns_1), (rows_2, columns_2) = (
            self._product(role) if role in self.keys else self._product(f"{role}_a", f"{role}_b")
            for role in ("lokr_w1", "lokr_w2")
        )
        return rows_1 * rows_2, columns_1 * columns_2

    def require_complete(self) -> None:
        """Raises `HyimgError` for a missing tensor, one of another kind, or one of a convolution."""
        roles, path, module = self.keys.keys(), self.header.path, self.key.module
        if tucker := [role for role in roles if role.endswith(("_t1", "_t2"))]:
            raise HyimgError(
                f"`{self.keys[tucker[0]].text}` in `{path}` is the core of a Tucker decomposition, which "
                f"is for convolutions, and `{module}` is a linear layer"
            )
        required = {"lora": {"down", "up"}, "loha": set(_LOHA_PARTS)}.get(self.kind) or {
            role for w in ("lokr_w1", "lokr_w2") for role in ((w,) if w in roles else (f"{w}_a", f"{w}_b"))
        }
        if surplus := roles - required - {"alpha", "magnitude"}:
            raise HyimgError(
                f"`{path}` holds tensors of two adapters of `{module}`: `{self.keys[min(surplus)].text}` and "
                f"those of a {KIND_TITLES[self.kind]}"
            )
        if missing := required - roles:
            raise HyimgError(
                f"`{path}` is incomplete: it has `{self.key.text}`, but not the "
                f"{' and '.join(sorted(missing))} of `{module}`"
            )

    def _product(self, left: str, right: str | None = None) -> tuple[int, int]:
        """The shape of left @ right, or of left alone."""
        a = self.shape_of(left)
        b = a if right is None else self.shape_of(right)
        if len(a) != 2 or len(b) != 2 or (right is not None and a[1] != b[0]) or 0 in (*a, *b):
            raise self._misshapen((left,) if right is None else (right, left))
        return a[0], b[1]

    def _misshapen(self, roles: tuple[str, ...]) -> HyimgError:
        shapes = " and ".join(str(list(self.shape_of(role))) for role in roles)
        return HyimgError(
            f"`{self.header.path}` is not a LoRA of HunyuanImage-2.1: the adapter of `{self.key.module}` has the "
            f"shapes {shapes}, which do not form a matrix product"
        )


def adapter_of(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> LoRA | LoHa | LoKr:
    """The frozen adapter of a module's tensors under the reference tool's role names; float32 unless `dtype`."""
    import torch

    from hyimg.lora.adapter import LoRA
    from hyimg.lora.lycoris import LoHa, LoKr

    kind = LoHa if tensors.keys() & LOHA_ROLES else LoKr if tensors.keys() & LOKR_ROLES else LoRA
    return kind.from_tensors(tensors, dtype or torch.float32)


@dataclass(frozen=True)
class LoRAFile:
    """An opened LoRA file. `formats` are those whose names it has exactly; none for another tool's.

    `hidden` and `mlp_hidden` are the sizes of its model. `unmapped` are the tensors that belong to no module that a
    LoRA of this model can adapt, if those were allowed.
    """

    header: Header
    adapters: tuple[StoredAdapter, ...]
    formats: tuple[str, ...]
    hidden: int
    mlp_hidden: int
    unmapped: tuple[str, ...] = ()
    peft: PeftConfig | None = None

    @staticmethod
    def open(path: str | os.PathLike[str], *, allow_partial: bool = False) -> LoRAFile:
        """Reads and checks the header of a LoRA file in any format or combination of them, or of one in a folder.

        `allow_partial` collects the tensors of other modules in `unmapped` instead of refusing the file.

        Raises `HyimgError` for whatever `read_header` refuses, a file that is not a LoRA, names of no module of this
        model, an incomplete adapter, and shapes that do not fit this model; and for what `weights_file` and
        `PeftConfig.find` refuse.
        """
        header = read_header(weights_file(Path(path)))
        keys, unmapped = _parse_keys(header)
        adapters = _group(header, keys)
        widths = _check_shapes(header, adapters)
        if unmapped and not allow_partial:
            raise HyimgError(
                f"`{header.path}` contains more than a LoRA of HunyuanImage-2.1: {len(unmapped)} of its "
                f"{len(header.tensors)} tensors are not read, {what_is_unmapped(header.tensors, unmapped)}",
                hint="`hyimg convert-comfy --allow_partial` makes a file without them",
            )
        # programs apply an alpha of the file, whatever a configuration has
        lacks_alpha = any("alpha" not in adapter.keys for adapter in adapters)
        peft = PeftConfig.find(header) if lacks_alpha else None
        adapters = [replace(adapter, widths=widths, peft=peft) for adapter in adapters]
        formats = () if unmapped else tuple(matching_formats(keys))
        if peft is not None:
            _check_peft(adapters, peft)
        return LoRAFile(header, tuple(adapters), formats, *widths, unmapped, peft)

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def module_names(self) -> list[str]:
        """The model's own names of the adapted modules: `double_blocks.0.img_attn_qkv`."""
        return list(dict.fromkeys(adapter.key.module for adapter in self.adapters))

    def warnings(self) -> list[str]:
        """Sentences about how strongly the file acts."""
        lines = []
        bare = [adapter.key.text for adapter in self.adapters if "alpha" not in adapter.keys]
        if self.peft is None and (warning := strength_unknown(self.header, bare)) is not None:
            lines.append(warning)
        scaled = [adapter for adapter in self.adapters if "alpha" in adapter.keys]
        if zero := [adapter.keys["alpha"].text for adapter in scaled if _is_zero(adapter)]:
            names = first_few([f"`{key}`" for key in zero])
            lines.append(
                f"`{self.path}`: the alpha of {len(zero)} adapters is 0, so they have no effect (the reference "
                f"tool and LyCORIS treat 0 as the rank): {names}"
            )
        if scaled and self._lacks_rslora_scale(scaled):
            lines.append(
                f"`{self.path}` was trained with LyCORIS's `rs_lora`, but its alphas are those of alpha/rank, which "
                "every program divides by the rank: it acts weaker than in training, by the square root of its rank"
            )
        return lines

    def _lacks_rslora_scale(self, scaled: Sequence[StoredAdapter]) -> bool:
        """Whether a release of LyCORIS wrote it that divides by the root of the rank but does not adjust alpha."""
        try:
            args = parse_json(self.header.metadata.get("ss_network_args", "{}"), "`ss_network_args`")
            alpha = float(self.header.metadata.get("ss_network_alpha", ""))
            is_rslora = str(args.get("rs_lora", False)).lower() == "true"
        except (HyimgError, ValueError):
            return False
        if not is_rslora or {adapter.rank for adapter in self.adapters} == {1}:
            return False
        return all(float(adapter.tensor("alpha")) == alpha for adapter in scaled)

    def column_doras(self) -> list[str]:
        """The modules whose DoRA has a norm for each input column (LyCORIS with `wd_on_output=False`)."""
        doras = [adapter for adapter in self.adapters if adapter.is_dora]
        shapes = [(adapter, adapter.shape_of("magnitude")) for adapter in doras]
        return [a.key.module for a, shape in shapes if (shape[0], shape[-1]) == (1, a.in_features)]


def _is_zero(adapter: StoredAdapter) -> bool:
    """Whether an alpha is 0 or -0, from its bytes, so that torch is not needed."""
    chunks = stored_chunks(adapter.header.path, *adapter.bytes_of("alpha"))
    value = int.from_bytes(b"".join(bytes(chunk) for chunk in chunks), "little")
    bits = 8 * DTYPES[adapter.dtype_of("alpha")][0]
    return value == 0 or ("F" in adapter.dtype_of("alpha") and value == 1 << (bits - 1))


def _parse_keys(header: Header) -> tuple[list[TensorKey], tuple[str, ...]]:
    """The keys in the order of the model's blocks, and the names that are none."""
    if not header.tensors:
        raise HyimgError(f"`{header.path}` holds no tensors", hint="copy or download it again")
    others = other_kinds(header.tensors)
    keys, unknown = [], []
    for text, info in header.tensors.items():
        if info.dtype not in DTYPES:
            raise HyimgError(
                f"`{text}` in `{header.path}` has the dtype {info.dtype}, which is not supported"
            )
        key = parse_key(text) if text not in others else None
        # an alpha may be an integer: it is read as a number, and never trained
        if key and key.role != "alpha" and not info.dtype.startswith(("F", "BF")):
            raise HyimgError(
                f"`{text}` in `{header.path}` has the dtype {info.dtype}, but the weights of a LoRA are "
                "floating-point numbers",
                hint="save the LoRA in bf16, fp16 or fp32",
            )
        if key and key.role == "alpha" and math.prod(info.shape) != 1:
            raise HyimgError(
                f"`{text}` in `{header.path}` has the shape {list(info.shape)}, but an alpha is one number"
            )
        keys.append(key) if key else unknown.append(text)
    if not keys:
        raise _foreign(header, others)
    ordered = sorted(keys, key=lambda key: (key.linear.block, key.index, key.part or 0, key.text))
    return ordered, tuple(unknown)


def _foreign(header: Header, others: Mapping[str, str]) -> HyimgError:
    model, kind = looks_like(header.tensors), identify(header.tensors)
    if others and model is None:
        kinds = list(dict.fromkeys(others.values()))
        return HyimgError(
            f"`{header.path}` is not a LoRA but {' and '.join(kinds)}, which is not supported: "
            f"{what_is_unmapped(header.tensors, list(others))}",
            hint="LoRA, DoRA, LoHa and LoKr are supported",
        )
    if kind != "lora":
        return HyimgError(f"`{header.path}` is not a LoRA but {KIND_NAMES[kind]}")
    likeness = f" but of {model}, judging by its names" if model else ""
    names = first_few([f"`{name}`" for name in header.tensors])
    return HyimgError(
        f"`{header.path}` is not a LoRA of HunyuanImage-2.1{likeness}: none of its {len(header.tensors)} tensors "
        f"belongs to a module that a LoRA can adapt: {names}"
    )


def _group(header: Header, keys: Sequence[TensorKey]) -> list[StoredAdapter]:
    """The complete adapters, by module in the order of their first keys."""
    modules: dict[str, dict[int | None, dict[str, TensorKey]]] = {}
    for key in keys:
        roles = modules.setdefault(key.module, {}).setdefault(key.part, {})
        if key.role in roles:
            raise HyimgError(
                f"`{header.path}` holds one tensor twice: `{roles[key.role].text}` and `{key.text}` are both the "
                f"{key.role} of `{key.module}`"
            )
        roles[key.role] = key
    adapters = []
    for name, parts in modules.items():
        if len(parts) > 1 and None in parts:
            raise HyimgError(
                f"`{header.path}` holds two adapters of `{name}`, one for all rows and one split by rows"
            )
        for roles in parts.values():
            adapters.append(StoredAdapter(header, roles))
            adapters[-1].require_complete()
    return adapters


def _check_shapes(header: Header, adapters: Sequence[StoredAdapter]) -> tuple[int, int]:
    """The hidden and the MLP size of the model that the file was trained on, after checking every shape."""
    sizes: list[tuple[str, Width, int]] = []
    for adapter in adapters:
        (rows, columns), key = adapter.shape(), adapter.key
        out_width = key.linear.out_width if key.part is None else key.linear.part_widths[key.part]
        sizes += [(key.module, key.linear.in_width, columns), (key.module, out_width, rows)]
    hidden = next((size // width[0] for _, width, size in sizes if width[0] and not width[1]), 0)
    mlp = next(
        (size - width[0] * hidden for _, width, size in sizes if width[1]), hidden * _DEFAULT_MLP_RATIO
    )
    if hidden in _FOREIGN_WIDTHS:
        raise HyimgError(
            f"`{header.path}` is not a LoRA of HunyuanImage-2.1 (3584 wide): it is {hidden} wide, like those of "
            f"{_FOREIGN_WIDTHS[hidden]}, whose modules have the same names"
        )
    for name, width, size in sizes:
        if size != width[0] * hidden + width[1] * mlp:
            raise HyimgError(
                f"`{header.path}` is not a LoRA of HunyuanImage-2.1: `{name}` is {size} wide where the width "
                f"{hidden} of the other modules requires {width[0] * hidden + width[1] * mlp}"
            )
    return hidden, mlp


def _check_peft(adapters: Sequence[StoredAdapter], peft: PeftConfig) -> None:
    """Raises HyimgError where PEFT's configuration belongs to other tensors."""
    for adapter in adapters:
        if "alpha" not in adapter.keys:
            peft.scale(adapter.key.stem, adapter.rank)
        if peft.uses_dora and not adapter.is_dora:
            raise HyimgError(
                f"{peft.where} has `use_dora`, but `{adapter.header.path}` holds no magnitude of "
                f"`{adapter.key.module}`",
                hint="save the adapter again, with all its tensors",
            )


def by_module(adapters: Sequence[StoredAdapter]) -> Iterator[list[StoredAdapter]]:
    """The adapters of each module, in the order of the modules' first ones."""
    modules: dict[str, list[StoredAdapter]] = {}
    for adapter in adapters:
        modules.setdefault(adapter.key.module, []).append(adapter)
    yield from modules.values()
