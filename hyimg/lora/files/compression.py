"""The best approximation of an update by one of a given rank, and its error (Eckart and Young, 1936).

The singular value decomposition is computed from the factors (their QR, then a small matrix) if they are smaller than
the product; that of a Kronecker product is the Kronecker product of its factors'. All in float64.

Shapes: I input features, O output features (of the given rows), R rank before, K rank after
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hyimg.checkpoints.safetensors_file import DTYPES
from hyimg.errors import HyimgError
from hyimg.lora.adapter import product_norm
from hyimg.lora.files.stored import StoredAdapter
from hyimg.lora.lycoris import LoKr

SVD = tuple[Tensor, Tensor, Tensor]
"""Left vectors (O, R), singular values (R) in descending order, right vectors (R, I)."""


@dataclass
class Compression:
    """An upper limit for ranks, and its cost so far: the squared error and the squared norm of each update."""

    max_rank: int
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def errors(self) -> Mapping[str, float]:
        """|D' - D| / |D| in the Frobenius norm, by module; 0 for an update of zeros."""
        return {name: _relative(*pair) for name, pair in self.squares.items()}

    @property
    def error(self) -> float | None:
        """The same over all modules that were compressed together; None if none was."""
        if not self.squares:
            return None
        return _relative(sum(e for e, _ in self.squares.values()), sum(n for _, n in self.squares.values()))

    def rank(self, adapters: Sequence[StoredAdapter], rows: tuple[int, int]) -> int:
        """The rank K of the approximation of these adapters on these rows."""
        return min(self.max_rank, rows[1] - rows[0], adapters[0].in_features)

    def compress(
        self, name: str, adapters: Sequence[StoredAdapter], rows: tuple[int, int], dtype: str
    ) -> tuple[Tensor, Tensor]:
        """(down (K, I), up (O, K)) of the sum on these rows, in `dtype` (as files name it); up needs no scale.

        Adds the error to `squares` under `name`. Raises `HyimgError` for values that are not finite or too large.
        """
        rank = self.rank(adapters, rows)
        left, singular, right = _decompose(adapters, rows, rank)
        root = singular[:rank].sqrt()
        missing = rank - len(root)  # an update of a lower rank is padded with zeros
        up = torch.nn.functional.pad(left[:, :rank] * root, (0, missing))
        down = torch.nn.functional.pad(root[:, None] * right[:rank], (0, 0, 0, missing))
        up_written, down_written = rounded(up, dtype), rounded(down, dtype)
        # what is dropped is orthogonal to what is kept, and the rounding is almost within that
        rounding = product_norm(
            torch.cat([up, up_written.double()], 1), torch.cat([down, -down_written.double()])
        )
        dropped = singular[rank:].square().sum() + rounding.square()
        self.squares[name] = (float(dropped), float(singular.square().sum()))
        return down_written, up_written


def joined(adapters: Sequence[StoredAdapter], rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(up (O, R), down (R, I)), float64, of the sum of all adapters on some rows of the weight.

    Each adapter has its own columns of up and rows of down.
    """
    ups, downs = zip(*(adapter.load().factors() for adapter in adapters), strict=True)
    up = torch.zeros(rows[1] - rows[0], sum(len(down) for down in downs), dtype=torch.float64)
    column = 0
    for adapter, part in zip(adapters, ups, strict=True):
        own, ours = _overlap(adapter, rows)
        up[ours, column : column + part.shape[1]] = part[own]
        column += part.shape[1]
    return up, torch.cat(downs)


def rounded(values: Tensor, dtype: str) -> Tensor:
    """`values` in a file's dtype. Raises `HyimgError` for a finite value that is too large for it."""
    narrow: Tensor = values.to(getattr(torch, DTYPES[dtype][1]))
    if bool(narrow.isinf().any()) and not bool(values.isinf().any()):
        raise HyimgError(
            f"the result has values up to {float(values.abs().max()):.2g}, which {dtype} cannot hold",
            hint="give smaller `--weights`",
        )
    return narrow


def _decompose(adapters: Sequence[StoredAdapter], rows: tuple[int, int], rank: int) -> SVD:
    """All singular values of the sum on these rows, and at least the first `rank` vectors, as far as there are any."""
    loaded = [adapter.load() for adapter in adapters]
    (num_rows, columns), first = (rows[1] - rows[0], adapters[0].in_features), loaded[0]
    decompose: Callable[..., SVD]
    if len(loaded) == 1 and isinstance(first, LoKr) and adapters[0].rows == rows:
        factors: tuple[Tensor, ...] = first.kronecker_factors()
        decompose = partial(_kronecker_svd, scale=first.scale, rank=rank)
    elif sum(adapter.factor_rank for adapter in loaded) < min(num_rows, columns):
        factors, decompose = joined(adapters, rows), _product_svd
    else:
        total = torch.zeros(num_rows, columns, dtype=torch.float64)
        for stored, adapter in zip(adapters, loaded, strict=True):
            own, ours = _overlap(stored, rows)
            total[ours] += adapter.delta_rows(own)
        factors, decompose = (total,), _dense_svd
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise HyimgError(
            f"the adapter with `{adapters[0].key.text}` in `{adapters[0].header.path}` holds NaN or infinity",
            hint="the training diverged: use a checkpoint that was saved earlier",
        )
    return decompose(*factors)


def _product_svd(up_OR: Tensor, down_RI: Tensor) -> SVD:
    left, left_core = torch.linalg.qr(up_OR)
    right, right_core = torch.linalg.qr(down_RI.T)
    u, singular, v = torch.linalg.svd(left_core @ right_core.T)
    return left @ u, singular, v @ right.T


def _dense_svd(delta_OI: Tensor) -> SVD:
    """From the eigenvectors of the smaller Gram matrix: faster than the decomposition of the matrix itself, and
    accurate down to singular values of 1e-7 of the largest, which float32 would lose as well."""
    if len(delta_OI) < delta_OI.shape[1]:
        u, singular, v = _dense_svd(delta_OI.T)
        return v.T, singular, u.T
    eigenvalues, v = torch.linalg.eigh(delta_OI.T @ delta_OI)
    singular, v = eigenvalues.flip(0).clamp(min=0).sqrt(), v.flip(1)
    kept = singular > 1e-7 * singular[0]
    singular, v = singular[kept], v[:, kept]
    return (delta_OI @ v) / singular, singular, v.T


def _kronecker_svd(w1: Tensor, w2: Tensor, *, scale: float, rank: int) -> SVD:
    """Of scale * kron(w1, w2): the products of their singular vectors. All values, and the first `rank` vectors."""
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(w, full_matrices=False) for w in (w1, w2))
    singular = torch.outer(s1, s2).flatten() * abs(scale)
    order = torch.argsort(singular, descending=True, stable=True)
    first, second = order[:rank] // len(s2), order[:rank] % len(s2)
    left = torch.einsum("ik,jk->ijk", u1[:, first], u2[:, second]).flatten(0, 1)
    right = torch.einsum("ki,kj->kij", v1[first], v2[second]).flatten(1)
    return left * math.copysign(1.0, scale), singular[order], right


def _overlap(adapter: StoredAdapter, rows: tuple[int, int]) -> tuple[slice, slice]:
    """The rows that an adapter shares with a range, counted from the adapter's first and from the range's."""
    start, end = max(rows[0], adapter.rows[0]), min(rows[1], adapter.rows[1])
    return slice(start - adapter.rows[0], end - adapter.rows[0]), slice(start - rows[0], end - rows[0])


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
