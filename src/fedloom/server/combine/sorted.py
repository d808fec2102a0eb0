"""Rules that sort every number and leave out the outer ones.

Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin, Chen, Ramchandran, Bartlett, ICML 2018
(arXiv:1803.01498).

Numbers of LoRA's factors can be compared because all clients begin at one pair of them, and an upload that left its
gauge is brought back to it. Clients count alike, whatever their weight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.core.protocols import Params
from fedloom.server.combine.robust import Robust, Updates
from fedloom.server.combine.weights import relative

_ROUNDING = 1e-9
"""0.29 * 100 is 28.99..."""


@dataclass(frozen=True, slots=True)
class Median(Robust):
    """The median of every number; holds while fewer than half are bad."""

    @property
    def rule(self) -> str:
        return "median"

    @property
    def least(self) -> int:
        return 3

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        return _within(arrived, (len(arrived.sent) - 1) // 2)


@dataclass(frozen=True, slots=True)
class TrimmedMean(Robust):
    """The mean of every number without the outer ones."""

    share: float = 0.2
    """Share of the clients left out on each side, (0, 0.5); it takes enough replies for one."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise ValueError(f"combine.trimmed_mean.share must be in (0, 0.5), got {self.share}")

    @property
    def rule(self) -> str:
        return "trimmed_mean"

    @property
    def least(self) -> int:
        return math.ceil(1 / self.share - _ROUNDING)

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        return _within(arrived, math.floor(self.share * len(arrived.sent) + _ROUNDING))


def _within(arrived: Updates, drop: int) -> tuple[Params, list[float]]:
    delta, used = trimmed(arrived.deltas, drop)
    count = len(used)
    return delta, relative(used, [(count - 2 * drop) / count] * count)


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
            inner = middle(block)
            parts.append(block.gather(0, inner).mean(0).to(dtype))
            taken += torch.bincount(inner.flatten(), minlength=len(deltas))
        size += first.numel()
        found[name] = torch.cat(parts).view(first.shape)
    return found, (taken / max(size, 1)).tolist()
