"""Updates combined number by number: sorted, the outer ones left out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedloom.core.protocols import Params

_CHUNK = 1 << 20
"""Entries sorted at once."""


def trimmed(deltas: Sequence[Params], drop: int) -> tuple[Params, list[float]]:
    """Return the mean of every coordinate without its `drop` smallest and largest, and the share of coordinates each counts in."""

    def middle(block: Tensor) -> Tensor:
        order = block.argsort(dim=0, stable=True)
        return order[drop : len(block) - drop]

    return _by_coordinate(deltas, middle)


def nearest_median(deltas: Sequence[Params], keep: int) -> tuple[Params, list[float]]:
    """Return the mean of the `keep` values of every coordinate nearest its median, and the share of coordinates each counts in."""

    def middle(block: Tensor) -> Tensor:
        ordered = block.sort(dim=0).values
        half = len(block) // 2
        median = (ordered[half] + ordered[-half - 1]) / 2
        return (block - median).abs().argsort(dim=0, stable=True)[:keep]

    return _by_coordinate(deltas, middle)


def _by_coordinate(
    deltas: Sequence[Params], middle: Callable[[Tensor], Tensor]
) -> tuple[Params, list[float]]:
    """Return the mean of what `middle` takes, (n, entries) -> (kept, entries) rows, in at least float32."""
    found: dict[str, Tensor] = {}
    taken, size = torch.zeros(len(deltas), dtype=torch.int64), 0
    for name, first in deltas[0].items():
        dtype = torch.promote_types(first.dtype, torch.float32)
        rows, parts = [delta[name].flatten() for delta in deltas], []
        for at in range(0, first.numel(), _CHUNK):
            block = torch.stack([row[at : at + _CHUNK].double() for row in rows])
            kept = middle(block)
            parts.append(block.gather(0, kept).mean(0).to(dtype))
            taken += torch.bincount(kept.flatten(), minlength=len(deltas))
        size += first.numel()
        found[name] = torch.cat(parts).view(first.shape)
    return found, (taken / max(size, 1)).tolist()
