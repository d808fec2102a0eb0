"""LoRA's factors as close to the shared start as the product they stand for allows.

A client may send (BQ, Q^-1 A) for (B, A): the same product, but in a mean of factors one huge A undoes everybody's. So
what is far from the start for no reason of its product is replaced by the pair of that product beside the start: B as A0's
rows tell it, A moved from A0 as far as that B gives evidence of, B once more to fit. It depends on the product and the
start alone.
"""

import math

import torch
from torch import Tensor

from fedloom.core.protocols import Params
from fedloom.server.combine.products import pairs, thin

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
