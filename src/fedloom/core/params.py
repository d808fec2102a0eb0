"""Arithmetic on Params. A name that ends in _ changes its first argument."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.core.protocols import Params, Payload


def params_map(fn: Callable[..., Tensor], *trees: Params) -> dict[str, Tensor]:
    """Apply `fn` name by name."""
    for other in trees[1:]:
        if other.keys() != trees[0].keys():
            raise ValueError(f"params differ in {sorted(other.keys() ^ trees[0].keys())[:4]}")
    columns = ([tree[name] for name in trees[0]] for tree in trees)
    return dict(zip(trees[0], map(fn, *columns), strict=True))


def add(a: Params, b: Params) -> Params:
    """Return a + b."""
    return params_map(torch.add, a, b)


def sub(a: Params, b: Params) -> Params:
    """Return a - b."""
    return params_map(torch.sub, a, b)


def sub_(a: Params, b: Params) -> Params:
    """Turn a into a - b, without a second copy of a large space."""
    return params_map(lambda x, y: x.sub_(y), a, b)


def axpy(scale: float, x: Params, y: Params) -> Params:
    """Return scale * x + y."""
    return params_map(lambda x, y: torch.add(y, x, alpha=scale), x, y)


def scale(a: Params, by: float) -> Params:
    """Return by * a."""
    return params_map(lambda x: x * by, a)


def equal(a: Params, b: Params) -> bool:
    """Return whether two Params are the same to the bit: names, types, shapes and values."""
    return a.keys() == b.keys() and all(
        t.dtype == b[name].dtype and torch.equal(t, b[name]) for name, t in a.items()
    )


def zeros_like(a: Params) -> Params:
    """Return the origin of the space of a."""
    return params_map(torch.zeros_like, a)


def flat(a: Params) -> Tensor:
    """Return all entries as (numel,), tensors in sorted order of their names."""
    return torch.cat([a[name].flatten() for name in sorted(a)])


def norm(payload: Payload) -> float:
    """Return the joint Euclidean norm of all groups, summed in float64."""
    squares = [t.double().square().sum() for group in payload.values() for t in group.values()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
