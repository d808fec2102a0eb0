"""Updates added up by shares: of the mean, within a bound, and what a share is worth beside that of a mean."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.core.protocols import Params

_TINY = 1e-100
"""A bound of no length divides nothing by zero."""


def summed(deltas: Sequence[Params], shares: Sequence[float]) -> Params:
    """Return the sum of updates by shares, in at least float32; of no share not even a huge one counts."""
    found: dict[str, Tensor] = {}
    for name, first in deltas[0].items():
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(first.shape, dtype=dtype)
        for delta, share in zip(deltas, shares, strict=True):
            if share:
                total.add_(delta[name], alpha=share)
        found[name] = total
    return found


def relative(shares: Sequence[float], alike: Sequence[float]) -> list[float]:
    """Return shares in units of what each would have in a mean, 1 at most."""
    return [min(1.0, share / own) for share, own in zip(shares, alike, strict=True)]


def in_mean(weights: Sequence[float]) -> list[float]:
    """Return the share that each has in the weighted mean."""
    total = sum(weights)
    return [weight / total for weight in weights]


def within(lengths: Tensor, bound: float | None) -> Tensor:
    """Return the (n,) shares of themselves by which vectors are within a bound; None: their median, the lower of two."""
    most = max(float(lengths.median()), _TINY) if bound is None else bound
    return most / lengths.clamp_min(most)
