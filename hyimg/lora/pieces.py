"""One adapter in a file: what kind it is, whether all of it is there, its shape and rank. Headers only.

    lora   alpha/rank * up @ down                                                     Hu et al., arXiv 2106.09685
    loha   alpha/rank * (w1_a @ w1_b) * (w2_a @ w2_b), the outer product by element   Hyeon-Woo et al., 2108.06098
    lokr   alpha/rank * kron(w1, w2), each of them whole or a product w_a @ w_b       Edalati et al., 2212.10650

The names and the scales of the last two are LyCORIS's (`lycoris/modules/loha.py`, `lokr.py`), which ComfyUI
reads alike. A LoKr of two whole factors has no rank and the scale 1, whatever its alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hyimg.errors import HyimgError
from hyimg.lora.formats import LOHA_ROLES, LOKR_ROLES
from hyimg.model.safetensors_file import Header

PieceKind = Literal["lora", "loha", "lokr"]
KIND_TITLES: Mapping[PieceKind, str] = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}

_PARTS_OF_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class Piece:
    """One adapter: its tensors' names in the file by role. `part` is its row range, None for all rows."""

    part: int | None
    keys: Mapping[str, str]

    @property
    def kind(self) -> PieceKind:
        if self.keys.keys() & LOHA_ROLES:
            return "loha"
        return "lokr" if self.keys.keys() & LOKR_ROLES else "lora"

    @property
    def weight_roles(self) -> tuple[str, ...]:
        """The roles of the matrices that are multiplied."""
        return tuple(role for role in self.keys if role not in ("alpha", "magnitude"))

    @property
    def is_dora(self) -> bool:
        return "magnitude" in self.keys

    def rank(self, header: Header) -> int | None:
        """What alpha is divided by; None for a LoKr of two whole factors, which is not scaled."""
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if role in self.keys:
                return header.tensors[self.keys[role]].shape[0]
        return None

    def shape(self, header: Header, module: str) -> tuple[int, int]:
        """(O, I) of the update. Raises `HyimgError` where the tensors' shapes make no product."""
        if self.kind == "lora":
            return self._product(header, module, "up", "down")
        if self.kind == "loha":
            first, second = (
                self._product(header, module, f"hada_{w}_a", f"hada_{w}_b") for w in ("w1", "w2")
            )
            if first != second:
                raise self._misshapen(header, module, _PARTS_OF_LOHA)
            return first
        (rows_1, columns_1), (rows_2, columns_2) = (self._factor(header, module, w) for w in ("w1", "w2"))
        return rows_1 * rows_2, columns_1 * columns_2

    def require_complete(self, header: Header, module: str) -> None:
        """Raises `HyimgError` where a tensor is missing, of another kind, or of a convolution."""
        roles = self.keys.keys()
        if tucker := [role for role in roles if role.endswith(("_t1", "_t2"))]:
            raise HyimgError(
                f"`{self.keys[tucker[0]]}` in `{header.path}` is the core of a Tucker decomposition, which "
                f"convolutions have, and `{module}` is a linear layer"
            )
        wanted = {"lora": {"down", "up"}, "loha": set(_PARTS_OF_LOHA)}.get(self.kind) or {
            role for w in ("lokr_w1", "lokr_w2") for role in ((w,) if w in roles else (f"{w}_a", f"{w}_b"))
        }
        if surplus := roles - wanted - {"alpha", "magnitude"}:
            raise HyimgError(
                f"`{header.path}` holds tensors of two adapters of `{module}`, `{self.keys[min(surplus)]}` beside "
                f"those of a {KIND_TITLES[self.kind]}"
            )
        if missing := wanted - roles:
            raise HyimgError(
                f"`{header.path}` is incomplete: `{next(iter(self.keys.values()))}` is there and the "
                f"{' and '.join(sorted(missing))} of `{module}` is not"
            )

    def _factor(self, header: Header, module: str, name: str) -> tuple[int, int]:
        role = f"lokr_{name}"
        if role not in self.keys:
            return self._product(header, module, f"{role}_a", f"{role}_b")
        shape = header.tensors[self.keys[role]].shape
        if len(shape) != 2 or 0 in shape:
            raise self._misshapen(header, module, (role,))
        return shape[0], shape[1]

    def _product(self, header: Header, module: str, left: str, right: str) -> tuple[int, int]:
        a, b = (header.tensors[self.keys[role]].shape for role in (left, right))
        if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in (*a, *b):
            raise self._misshapen(header, module, (right, left))
        return a[0], b[1]

    def _misshapen(self, header: Header, module: str, roles: tuple[str, ...]) -> HyimgError:
        shapes = " and ".join(str(list(header.tensors[self.keys[role]].shape)) for role in roles)
        return HyimgError(
            f"`{header.path}` is no LoRA of HunyuanImage-2.1: the adapter of `{module}` has the "
            f"shapes {shapes}, which do not make a product of matrices"
        )
