"""Products of two thin matrices: sums, norms and singular values, none of which writes a product down.

All of it in float64. A product of stacked factors is R_b R_a^T between orthonormal columns, by a thin QR of each side, so
that whatever is asked of it is asked of a small square. Singular vectors have a sign of their own: the largest entry of
each left one is positive, so that two machines and a resumed run have the same factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = 1e-13
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The matrix b a, (out, in)."""

    b: Tensor
    """(out, rank) float64."""
    a: Tensor
    """(rank, in) float64."""

    @classmethod
    def of(cls, b: Tensor, a: Tensor) -> "Pair":
        """Return the pair of two factors of any type."""
        return cls(b.double(), a.double())

    @property
    def rank(self) -> int:
        """Return the columns it has, which its product's rank is at most."""
        return len(self.a)

    def times(self, factor: float) -> "Pair":
        """Return factor times the product."""
        return Pair(self.b * factor, self.a)

    def padded(self, rank: int) -> "Pair":
        """Return the same product with zeros for what is missing to a rank."""
        missing = rank - self.rank
        return Pair(
            torch.nn.functional.pad(self.b, (0, missing)),
            torch.nn.functional.pad(self.a, (0, 0, 0, missing)),
        )


def total(pairs: Sequence[Pair]) -> Pair:
    """Return the sum of products, of the sum of their ranks."""
    return Pair(torch.cat([p.b for p in pairs], dim=1), torch.cat([p.a for p in pairs]))


def difference(one: Pair, other: Pair) -> Pair:
    """Return one product minus another."""
    return total([one, other.times(-1.0)])


def norm(pair: Pair) -> float:
    """Return the Frobenius norm of a product."""
    left = torch.linalg.qr(pair.b, mode="r")[1]
    right = torch.linalg.qr(pair.a.T, mode="r")[1]
    return float(torch.linalg.matrix_norm(left @ right.T))


@dataclass(frozen=True, slots=True)
class Singular:
    """Singular values and vectors of a product, the largest first."""

    left: Tensor
    """(out, n), orthonormal columns."""
    values: Tensor
    """(n,)."""
    right: Tensor
    """(n, in), orthonormal rows."""

    @property
    def rank(self) -> int:
        """Return how many values are more than rounding."""
        largest = float(self.values[0]) if len(self.values) else 0.0
        return int((self.values > EMPTY * largest).sum())

    def beyond(self, rank: int) -> float:
        """Return the norm of what a product of this rank cannot hold (Eckart, Young)."""
        return float(torch.linalg.vector_norm(self.values[rank:]))

    def balanced(self, rank: int) -> Pair:
        """Return the nearest product of a rank, its scale split evenly between the factors."""
        root = self.values[:rank].sqrt()
        return Pair(self.left[:, :rank] * root, self.right[:rank] * root[:, None])

    def orthonormal(self, rank: int) -> Pair:
        """Return the nearest product of a rank, its scale in b alone."""
        return Pair(self.left[:, :rank] * self.values[:rank], self.right[:rank])


def singular(pair: Pair) -> Singular:
    """Return the singular values and vectors of a product, by a thin QR of each factor."""
    q_left, r_left = torch.linalg.qr(pair.b)
    q_right, r_right = torch.linalg.qr(pair.a.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    left, right = q_left @ u, v @ q_right.T
    at = left.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(left.gather(0, at) < 0, -1.0, 1.0).to(left)
    return Singular(left * sign, values, right * sign.T)
