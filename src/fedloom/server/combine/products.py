"""How updates of a model lie to one another, LoRA's factors by what they do to the model: the product BA.

(B, A) and (BQ, Q^-1 A) are one update, so that distances of factors say nothing. With B and A a client's factors and B0, A0
those it began at, BA - B0 A0 is a product of matrices of twice the rank, whose inner product with another client's is a
trace of products of small squares. BA itself is never written down. The scale of an adapter, one for all layers, is left
out.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedloom.core.protocols import Params

_A, _B = "lora_A", "lora_B"
_CHUNK = 1 << 20
"""Entries of plain tensors multiplied at once."""


def pairs(params: Params) -> Iterator[tuple[str, str]]:
    """Yield the names of each layer's two factors, A's first."""
    for name in sorted(params):
        if _A in name and name.replace(_A, _B) in params:
            yield name, name.replace(_A, _B)


def inner_products(start: Params, deltas: Sequence[Params]) -> Tensor:
    """Return the (n, n) float64 inner products of updates from `start`, all layers together.

    Tensors that are no pair of factors count as they are, among them a B whose A is frozen.
    """
    count = len(deltas)
    total = torch.zeros(count, count, dtype=torch.float64)
    paired = list(pairs(start))
    for a, b in paired:
        total += _of_pair(start[a], start[b], [d[a] for d in deltas], [d[b] for d in deltas])
    for name in sorted(start.keys() - {name for pair in paired for name in pair}):
        rows = [delta[name].flatten() for delta in deltas]
        for at in range(0, rows[0].numel(), _CHUNK):
            block = torch.stack([row[at : at + _CHUNK].double() for row in rows])
            total += block @ block.T
    return total


def thin(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product b a as (out, rank) times orthonormal rows (rank, in).

    What is huge in one factor meets what is tiny in the other here and nowhere else: what is compared is what is used.
    """
    rows, triangle = torch.linalg.qr(a.double().T)
    return b.double() @ triangle.T, rows.T


def squared_distances(products: Tensor) -> Tensor:
    """Return the (n, n) squared distances of what has these inner products."""
    lengths = products.diagonal()
    return (lengths + lengths[:, None] - products - products.T).clamp_min_(0).fill_diagonal_(0)


def _of_pair(a: Tensor, b: Tensor, moved_a: Sequence[Tensor], moved_b: Sequence[Tensor]) -> Tensor:
    a, b = a.double(), b.double()
    whole = [
        thin(a + da.double(), b + db.double()) for da, db in zip(moved_a, moved_b, strict=True)
    ]
    columns = torch.stack([torch.cat([left, -b], dim=1) for left, _ in whole])  # (n, out, 2 rank)
    rows = torch.stack([torch.cat([right, a]) for _, right in whole])  # (n, 2 rank, in)
    found = torch.empty(len(columns), len(columns), dtype=torch.float64)
    for at, (left, right) in enumerate(zip(columns, rows, strict=True)):
        # (n, 2 rank, 2 rank) each: tr(R_j R_i^T L_i^T L_j)
        found[at] = ((left.T @ columns) * (right @ rows.mT)).sum((1, 2))
    return (found + found.T) / 2


_SLACK = 2.0
"""How many times as far as that pair factors may be to count as they are: honest ones are, and stay to the bit."""
_EVIDENCE = 0.25
"""A direction of B holds A's row where it is larger than this share of the mean direction; A moves by
twice its length at most."""


def settled(start: Params, delta: Params) -> Params:
    """Return an update with every pair of factors that is needlessly far from `start` replaced by the pair beside it."""
    changed: dict[str, Tensor] = {}
    for a, b in pairs(start):
        near_a, near_b = _nearest(*(t.double() for t in (start[a], start[b], delta[a], delta[b])))
        if _length(delta[a], delta[b]) > _SLACK * _length(near_a, near_b):
            changed |= {a: near_a.to(delta[a].dtype), b: near_b.to(delta[b].dtype)}
    return {**delta, **changed} if changed else delta


def _nearest(a0: Tensor, b0: Tensor, moved_a: Tensor, moved_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return how A (rank, in) and B (out, rank) move to that pair."""
    b, a = thin(a0 + moved_a, b0 + moved_b)
    squares = a0 @ a0.T
    size = b.square().sum()  # of the product, as the rows of a are orthonormal
    if not bool(squares.any()):
        return moved_a, moved_b
    if not float(size) > 0:
        return torch.zeros_like(a0), -b0
    seen = b @ (a @ a0.T) @ _inverse(squares)
    held = seen.T @ seen
    ridge = _EVIDENCE**2 * size / squares.trace()
    towards = (seen.T @ b) @ a - held @ a0
    move = torch.linalg.solve(held + ridge * torch.eye(len(held), dtype=held.dtype), towards)
    near = a0 + move
    return move, b @ (a @ near.T) @ _inverse(near @ near.T) - b0


def _inverse(square: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(square, rtol=1e-10, hermitian=True)
    return inverse


def _length(*tensors: Tensor) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))
