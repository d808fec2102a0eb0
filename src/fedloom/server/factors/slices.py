"""Which columns of a layer's factors one client has: those of its rank, and beside them those of the frozen pair.

A space holds `most` columns that learn and `side` behind them that do not: B is (out, most + side), A (most + side, in). A
client is sent the first `rank` of the ones, and of the others as many as hold anything. In its space what is missing is
zero in both factors, so that no gradient reaches it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.core.protocols import Params
from fedloom.server.combine.products import pairs
from fedloom.server.factors.pair import Pair


def learning(params: Params, rank: int) -> Params:
    """Return params with the first columns of every pair; the same object where those are all."""
    changed: dict[str, Tensor] = {}
    for a, b in pairs(params):
        if len(params[a]) != rank:
            changed |= {a: params[a][:rank].clone(), b: params[b][:, :rank].clone()}
    return {**params, **changed} if changed else params


def rank_of(params: Params) -> int:
    """Return the columns that every pair has."""
    return next(len(params[a]) for a, _ in pairs(params))


def frozen(params: Params, *, most: int, used: int) -> Params:
    """Return the columns of every pair that do not learn and hold something, without any other tensor."""
    found: dict[str, Tensor] = {}
    if used:
        for a, b in pairs(params):
            found[a] = params[a][most : most + used].clone()
            found[b] = params[b][:, most : most + used].clone()
    return found


def whole(learns: Params, beside: Params, *, most: int, side: int) -> Params:
    """Return the space of what `learning` and `frozen` cut out of it; the first as it is where that is all."""
    changed: dict[str, Tensor] = {}
    for a, b in pairs(learns):
        rank, used = len(learns[a]), len(beside[a]) if beside else 0
        if rank == most + side:
            continue
        both_a = learns[a].new_zeros(most + side, learns[a].shape[1])
        both_b = learns[b].new_zeros(len(learns[b]), most + side)
        both_a[:rank], both_b[:, :rank] = learns[a], learns[b]
        if used:
            both_a[most : most + used], both_b[:, most : most + used] = beside[a], beside[b]
        changed |= {a: both_a, b: both_b}
    return {**learns, **changed} if changed else learns


def still(params: Params, *, most: int) -> Params:
    """Return a mask of gradients that keeps what is behind the columns that learn as it is."""
    found = {name: torch.ones((), dtype=t.dtype) for name, t in params.items()}
    for a, b in pairs(params):
        found[a], found[b] = torch.ones_like(params[a]), torch.ones_like(params[b])
        found[a][most:] = 0
        found[b][:, most:] = 0
    return found


def scaled(params: Params, by: float) -> Params:
    """Return params with every B multiplied; the same object by 1."""
    if by == 1:
        return params
    return {**params, **{b: params[b] * by for _, b in pairs(params)}}


def columns(params: Params, names: tuple[str, str], start: int, end: int | None = None) -> Pair:
    """Return some columns of a layer's factors, which are named A's first."""
    a, b = names
    return Pair.of(params[b][:, start:end], params[a][start:end])


def tensors(parts: Sequence[Pair], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and B of pairs side by side."""
    a, b = torch.cat([p.a for p in parts]), torch.cat([p.b for p in parts], dim=1)
    return a.to(dtype), b.to(dtype)
