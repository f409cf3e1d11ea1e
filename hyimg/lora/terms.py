"""The terms of a module's update: adapters of one file or of several, each with its weight in the sum.

Values are float64 numpy arrays; no torch.

Shapes: I input features, O output features (of the rows that are asked for), R rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyimg.errors import HyimgError
from hyimg.lora.contents import AdaptedModule, LoRAContents
from hyimg.lora.formats import Target
from hyimg.lora.pieces import Piece, PieceKind
from hyimg.lora.values import read_values

if TYPE_CHECKING:
    from hyimg.lora.values import Values


@dataclass(frozen=True)
class Term:
    """`weight` times the update of one piece of one file, on some rows of a module's weight."""

    contents: LoRAContents
    target: Target
    piece: Piece
    weight: float = 1.0

    @property
    def kind(self) -> PieceKind:
        return self.piece.kind

    @property
    def name(self) -> str:
        """One of its tensors' names in the file, to show it by."""
        return next(iter(self.piece.keys.values()))

    @property
    def rows(self) -> tuple[int, int]:
        """The rows of the module's weight that it changes, half open."""
        return self.contents.rows(self.target, self.piece.part)

    @property
    def rank(self) -> int:
        """The width of down and up; of a LoHa or LoKr that of its parts (1 where they have none)."""
        return self.piece.rank(self.contents.header) or 1

    def dtype(self, role: str) -> str:
        return self.contents.header.tensors[self.piece.keys[role]].dtype

    @property
    def scale(self) -> float:
        """weight * alpha/rank. Without an alpha tensor PEFT's configuration tells it, and without that it is 1.

        Raises `HyimgError` for an alpha that is not one finite number.
        """
        if self.piece.rank(self.contents.header) is None:
            return self.weight
        if "alpha" in self.piece.keys:
            return self.weight * self.alpha() / self.rank
        return self.weight * self.contents.peft_scale(self.name, self.rank)

    def alpha(self) -> float:
        key = self.piece.keys["alpha"]
        values = read_values(self.contents.header, key).reshape(-1)
        if len(values) != 1 or not math.isfinite(values[0]):
            raise HyimgError(f"`{key}` in `{self.contents.path}` is not one finite number")
        return float(values[0])

    def values(self, role: str, rows: tuple[int, int] | None = None) -> Values:
        return read_values(self.contents.header, self.piece.keys[role], rows)

    @property
    def inner(self) -> int:
        """How many columns the up of `factors` has; a LoHa's ranks multiply."""
        header, keys = self.contents.header, self.piece.keys
        if self.kind == "lora":
            return self.rank
        if self.kind == "loha":
            return header.tensors[keys["hada_w1_b"]].shape[0] * header.tensors[keys["hada_w2_b"]].shape[0]
        columns = self.contents.width(self.target.in_width)
        if "lokr_w2" in keys:
            return columns
        rank, columns_2 = header.tensors[keys["lokr_w2_b"]].shape
        return columns // columns_2 * rank

    def factors(self) -> tuple[Values, Values]:
        """(up, down) of all its rows with scale * update = up @ down, exactly; not for a LoKr with a whole `w2`."""
        import numpy as np

        if self.kind == "lora":
            return self.values("up") * self.scale, self.values("down")
        if self.kind == "loha":
            a1, b1, a2, b2 = self._loha_parts()
            up = (a1[:, :, None] * a2[:, None, :]).reshape(len(a1), -1)
            down = (b1[:, None, :] * b2[None, :, :]).reshape(-1, b1.shape[1])
            return up * self.scale, down
        w1, _ = self.kronecker_factors()
        a2, b2 = self.values("lokr_w2_a"), self.values("lokr_w2_b")
        return _kron(w1, a2) * self.scale, _kron(np.eye(w1.shape[1]), b2)

    def delta(self) -> Values:
        """scale * update on all its rows, (O, I)."""
        if self.kind == "lora":
            return self.values("up") @ self.values("down") * self.scale
        if self.kind == "loha":
            a1, b1, a2, b2 = self._loha_parts()
            return (a1 @ b1) * (a2 @ b2) * self.scale
        return _kron(*self.kronecker_factors()) * self.scale

    def _loha_parts(self) -> list[Values]:
        return [self.values(f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b")]

    def kronecker_factors(self) -> tuple[Values, Values]:
        """(w1, w2) of a LoKr, each whole; not yet scaled."""
        w1, w2 = (
            self.values(role)
            if role in self.piece.keys
            else self.values(f"{role}_a") @ self.values(f"{role}_b")
            for role in ("lokr_w1", "lokr_w2")
        )
        return w1, w2


def terms_of(files: Sequence[tuple[LoRAContents, float]]) -> Mapping[str, tuple[AdaptedModule, list[Term]]]:
    """By the modules' names, in the order of the model's blocks: a module, and what all files have for it."""
    found: dict[str, tuple[AdaptedModule, list[Term]]] = {}
    for contents, weight in files:
        for module in contents.modules:
            _, terms = found.setdefault(module.name, (module, []))
            terms += [Term(contents, module.target, piece, weight) for piece in module.pieces]
    return found


def joined(terms: Sequence[Term], rows: tuple[int, int]) -> tuple[Values, Values]:
    """(up, down) of the sum of all terms on some rows of the weight: blocks of each term's own."""
    import numpy as np

    ups, downs = zip(*(term.factors() for term in terms), strict=True)
    up = np.zeros((rows[1] - rows[0], sum(len(down) for down in downs)))
    column = 0
    for term, part in zip(terms, ups, strict=True):
        mine, theirs = _overlap(term, rows)
        up[theirs, column : column + part.shape[1]] = part[mine]
        column += part.shape[1]
    return up, np.concatenate(downs)


def summed(terms: Sequence[Term], rows: tuple[int, int]) -> Values:
    """The sum of all terms on some rows of the weight, (O, I)."""
    import numpy as np

    columns = terms[0].contents.width(terms[0].target.in_width)
    total = np.zeros((rows[1] - rows[0], columns))
    for term in terms:
        mine, theirs = _overlap(term, rows)
        total[theirs] += term.delta()[mine]
    return total


def _overlap(term: Term, rows: tuple[int, int]) -> tuple[slice, slice]:
    """The rows that a term has in common with a range, counted from the term's first and from the range's."""
    start, end = max(rows[0], term.rows[0]), min(rows[1], term.rows[1])
    return slice(start - term.rows[0], end - term.rows[0]), slice(start - rows[0], end - rows[0])


def _kron(a: Values, b: Values) -> Values:
    """The Kronecker product of two matrices."""
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(len(a) * len(b), -1)
