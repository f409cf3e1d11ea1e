"""The best approximation of an update by one of a given rank, and how good it is (Eckart and Young, 1936).

The singular value decomposition is made of the factors (their QR, then a small matrix), never of the product
where the factors are smaller; that of a Kronecker product is the Kronecker product of its factors'.

Shapes: I input features, O output features, R rank before, K rank after
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from hyimg.errors import HyimgError
from hyimg.lora.terms import Term, joined, summed
from hyimg.lora.values import encode, rounded

if TYPE_CHECKING:
    from hyimg.lora.values import Values


@dataclass
class Compression:
    """A bound on ranks, and what it has cost up to now: the squared error and the squared norm of each update."""

    max_rank: int
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def errors(self) -> Mapping[str, float]:
        """|D' - D| / |D| in the Frobenius norm, by module; 0 for an update of zeros."""
        return {name: _relative(*pair) for name, pair in self.squares.items()}

    @property
    def error(self) -> float:
        """The same over all modules that were compressed together."""
        return _relative(sum(e for e, _ in self.squares.values()), sum(n for _, n in self.squares.values()))

    def rank(self, terms: Sequence[Term], rows: tuple[int, int]) -> int:
        """The rank that is written for these terms on these rows."""
        return min(self.max_rank, rows[1] - rows[0], _columns(terms[0]))


@dataclass
class Compressed:
    """The two halves of a compressed update as bytes, computed when the first is asked for.

    The tensors of a module are neighbours in a file, so that few halves wait at a time.
    """

    compression: Compression
    name: str
    terms: Sequence[Term]
    rows: tuple[int, int]
    dtype: str
    _waiting: dict[str, bytes] = field(default_factory=dict)

    def half(self, role: str) -> list[bytes]:
        """The bytes of `down` (K, I) or `up` (O, K); up is not scaled any more."""
        if role not in self._waiting:
            self._waiting |= self._compute()
        return [self._waiting.pop(role)]

    def _compute(self) -> dict[str, bytes]:
        import numpy as np

        rank = self.compression.rank(self.terms, self.rows)
        best = truncated(self.terms, self.rows, rank)
        missing = rank - best.up_OK.shape[1]  # an update of a lower rank: filled up with zeros
        up_OK = np.pad(best.up_OK, ((0, 0), (0, missing)))
        down_KI = np.pad(best.down_KI, ((0, missing), (0, 0)))
        written = rounded(up_OK, self.dtype), rounded(down_KI, self.dtype)
        # what is left out stands at right angles to what is kept, and the rounding is nearly in it
        rounding = _square(np.hstack([up_OK, written[0]]), np.vstack([down_KI, -written[1]]))
        self.compression.squares[self.name] = (best.dropped + rounding, best.square)
        return {"up": encode(up_OK, self.dtype), "down": encode(down_KI, self.dtype)}


@dataclass(frozen=True)
class Truncated:
    """The best approximation up @ down; `dropped` is the square of what it lacks, `square` that of the whole."""

    up_OK: Values
    down_KI: Values
    dropped: float
    square: float


def truncated(terms: Sequence[Term], rows: tuple[int, int], rank: int) -> Truncated:
    """The best approximation of the terms' sum on these rows, of `rank` or what rank there is.

    Both halves carry the root of the singular values. Raises `HyimgError` for values that are not finite.
    """
    import numpy as np

    if len(terms) == 1 and terms[0].kind == "lokr" and terms[0].rows == rows:
        factors: tuple[Values, ...] = terms[0].kronecker_factors()
        decompose: Callable[..., tuple[Values, Values, Values]] = partial(
            _kronecker_svd, scale=terms[0].scale, rank=rank
        )
    elif sum(term.inner for term in terms) < min(rows[1] - rows[0], _columns(terms[0])):
        factors, decompose = joined(terms, rows), _svd
    else:
        factors, decompose = (summed(terms, rows),), _dense_svd
    if not all(np.isfinite(factor).all() for factor in factors):
        raise HyimgError(
            f"the adapter with `{terms[0].name}` in `{terms[0].contents.path}` holds NaN or infinity",
            hint="its training went astray: take a file that was saved earlier",
        )
    left, singular, right = decompose(*factors)
    root = singular[:rank] ** 0.5
    return Truncated(
        left[:, :rank] * root,
        root[:, None] * right[:rank],
        float((singular[rank:] ** 2).sum()),
        float((singular**2).sum()),
    )


def _svd(up: Values, down: Values) -> tuple[Values, Values, Values]:
    """(left, singular values, right) of up @ down."""
    import numpy as np

    left, left_core = np.linalg.qr(up)
    right, right_core = np.linalg.qr(down.T)
    u, singular, v = np.linalg.svd(left_core @ right_core.T)
    return left @ u, singular, v @ right.T


def _dense_svd(delta_OI: Values) -> tuple[Values, Values, Values]:
    """By the eigenvectors of the smaller Gram matrix: faster than the decomposition of the matrix itself, and
    good down to singular values of 1e-7 of the largest, which float32 would lose as well."""
    import numpy as np

    if len(delta_OI) < delta_OI.shape[1]:
        u, singular, v = _dense_svd(delta_OI.T)
        return v.T, singular, u.T
    eigenvalues, v = np.linalg.eigh(delta_OI.T @ delta_OI)
    singular, v = np.sqrt(np.maximum(eigenvalues[::-1], 0)), v[:, ::-1]
    kept = singular > 1e-7 * singular[0]
    singular, v = singular[kept], v[:, kept]
    return (delta_OI @ v) / singular, singular, v.T


def _kronecker_svd(w1: Values, w2: Values, *, scale: float, rank: int) -> tuple[Values, Values, Values]:
    """Of scale * kron(w1, w2): the pairs of their singular vectors. All values, and the first `rank` vectors."""
    import numpy as np

    (u1, s1, v1), (u2, s2, v2) = (np.linalg.svd(w, full_matrices=False) for w in (w1, w2))
    singular = np.outer(s1, s2).reshape(-1) * abs(scale)
    order = np.argsort(-singular, kind="stable")
    first, second = np.divmod(order[:rank], len(s2))
    left = np.einsum("ik,jk->ijk", u1[:, first], u2[:, second]).reshape(len(u1) * len(u2), -1)
    right = np.einsum("ki,kj->kij", v1[first], v2[second]).reshape(len(first), -1)
    return left * math.copysign(1.0, scale), singular[order], right


def _columns(term: Term) -> int:
    return term.contents.width(term.target.in_width)


def _square(up: Values, down: Values) -> float:
    """|up @ down|^2 from the halves' Gram matrices."""
    return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
