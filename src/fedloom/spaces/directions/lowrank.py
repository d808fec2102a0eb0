"""Directions of low rank: z = U V^T / sqrt(r), so that a sum of them is a product of matrices.

U (m, r) and V (n, r) hold normal deviates: the entries of z have unit variance, and of rank 1 the second moment of the
gradient's guess is (m + 2)(n + 2) where gaussian entries give m n + 2. Chen et al., "Enhancing Zeroth-order Fine-tuning
for Language Models with Low-rank Structures", arXiv:2410.07698. In the stream, a tensor's elements are the r columns of
U, then the r columns of V.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.spaces.directions.kernels import fill
from fedloom.spaces.directions.stream import Draw, cut, tag_of

_AT_ONCE = 256
"""Directions drawn together."""
_SUMS = 1 << 24
"""Entries of a matrix that are summed before they are rounded: 64 MB of float32."""
_CACHED = 1 << 16
"""Entries of a single product that are summed together: a quarter of a megabyte, which stays in a core's cache."""


Drawn = tuple[Tensor, Tensor]
"""Of a matrix (m, n): (K, r, m) and (K, r, n) float32, with z_k = sum_r u_kr v_kr^T."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The directions of one matrix."""

    tensor: int
    """Place in the layout."""
    shape: tuple[int, int]
    """(m, n)"""
    rank: int

    def draw(
        self, keys: NDArray[np.uint32], *, rows: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return (K, r, len(rows)) and (K, r, n) float32, with z_k[rows] = sum_r u_kr v_kr^T; `rows` on the CPU."""
        (m, n), r = self.shape, self.rank
        if len(rows) == m:  # all of them: one stretch for all columns
            pieces = _stretch(self.tensor, 0, r * m)
        else:
            pieces = _columns(self.tensor, rows.numpy(), m, r)
        u = self._fill(keys, pieces, r * len(rows), device)
        v = self._fill(keys, _stretch(self.tensor, r * m, r * (m + n)), r * n, device)
        return u.view(-1, r, len(rows)).mul_(r**-0.5), v.view(-1, r, n)

    def add(
        self,
        keys: NDArray[np.uint32],
        base: Tensor,
        out: Tensor,
        by: Sequence[float],
        *,
        scale: float = 1.0,
        rows: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> None:
        """Write scale * base + sum_k by_k z_k[rows] into `out`, (rows, n); sums of float32 products, rounded once.

        A single direction of all rows that is `drawn` already is not drawn again.
        """
        rows = torch.arange(self.shape[0]) if rows is None else rows
        kind = torch.float64 if out.dtype == torch.float64 else torch.float32
        factors = torch.tensor(by, dtype=torch.float64).to(out.device, kind)
        if len(keys) * self.rank == 1:
            u, v = drawn or self.draw(keys, rows=rows, device=out.device)
            _add_outer((u.to(kind) * factors)[0].t(), v.to(kind)[0], base, out, scale=scale)
            return
        step = max(1, _SUMS // self.shape[1])
        for first in range(0, len(rows), step):
            here = slice(first, first + step)
            sums = torch.zeros_like(out[here], dtype=kind)
            for k in range(0, len(keys), _AT_ONCE):
                some = slice(k, k + _AT_ONCE)
                u, v = self.draw(keys[some], rows=rows[here], device=out.device)
                u, v = u.to(kind).mul_(factors[some, None, None]), v.to(kind)
                sums.addmm_(u.flatten(0, 1).t(), v.flatten(0, 1))
            out[here].copy_(sums.add_(base[here].to(kind), alpha=scale))

    def project(self, keys: NDArray[np.uint32], values: Tensor) -> Tensor:
        """Return z_k . values, (K,) float64, of values (m, n)."""
        kind = torch.float64 if values.dtype == torch.float64 else torch.float32
        rows, matrix = torch.arange(self.shape[0]), values.to(kind)
        sums = []
        for k in range(0, len(keys), _AT_ONCE):
            u, v = self.draw(keys[k : k + _AT_ONCE], rows=rows, device=values.device)
            sums.append((u.double() * (v.to(kind) @ matrix.t())).sum((1, 2)).cpu())
        return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64)

    def _fill(
        self, keys: NDArray[np.uint32], pieces: NDArray[np.int64], size: int, device: torch.device
    ) -> Tensor:
        out = torch.empty(len(keys), size, device=device)
        fill(Draw("gaussian", tag_of("lowrank"), keys, pieces), out)
        return out


def draw_all(
    matrices: Sequence[Factors], keys: NDArray[np.uint32], *, device: torch.device
) -> list[Drawn]:
    """Return the directions of several matrices of one rank, drawn in one go: one by one, the calls cost more."""
    sizes = np.array([matrix.rank * sum(matrix.shape) for matrix in matrices])
    ends = np.cumsum(sizes)
    places = np.array([matrix.tensor for matrix in matrices])
    flat = torch.empty(len(keys), int(ends[-1]), device=device)
    fill(Draw("gaussian", tag_of("lowrank"), keys, cut(places, 0, sizes, ends - sizes)), flat)
    found = []
    for matrix, part in zip(matrices, torch.split(flat, sizes.tolist(), dim=1), strict=True):
        (m, n), r = matrix.shape, matrix.rank
        u, v = torch.split(part, [r * m, r * n], dim=1)
        found.append((u.mul_(r**-0.5).view(-1, r, m), v.view(-1, r, n)))
    return found


def _columns(tensor: int, rows: NDArray[np.int64], m: int, r: int) -> NDArray[np.int64]:
    """Return the pieces of some rows of U's columns; neighbours are one piece, since a kernel draws 128 elements at least."""
    begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    lengths = np.diff(begins, append=len(rows))
    column = np.arange(r)[:, None]
    starts = (column * m + rows[begins]).reshape(-1)
    at = (column * len(rows) + begins).reshape(-1)
    return cut(tensor, starts, starts + np.tile(lengths, r), at)


def _add_outer(u: Tensor, v: Tensor, base: Tensor, out: Tensor, *, scale: float) -> None:
    """Write scale * base + u v^T into `out`, of u (m, 1) and v (1, n): rounded as a sum of many, in one pass over memory."""
    step = max(1, _CACHED // v.shape[1]) if out.device.type == "cpu" else len(out)
    product = v.new_empty(min(step, len(out)), v.shape[1])
    for first in range(0, len(out), step):
        here = slice(first, first + step)
        some = product[: len(out[here])]
        torch.mul(u[here], v, out=some)
        if base.dtype == out.dtype == some.dtype:
            torch.add(some, base[here], alpha=scale, out=out[here])
        else:
            out[here].copy_(some.add_(base[here].to(some.dtype), alpha=scale))


@lru_cache(maxsize=4096)
def _stretch(tensor: int, first: int, last: int) -> NDArray[np.int64]:
    return cut(tensor, first, last, 0)
