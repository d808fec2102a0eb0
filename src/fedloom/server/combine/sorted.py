"""Rules that sort every number and leave out the outer ones.

Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin, Chen, Ramchandran, Bartlett, ICML 2018
(arXiv:1803.01498).

Numbers of LoRA's factors can be compared because all clients begin at one pair of them, and an upload that left its
gauge is brought back to it. Clients count alike, whatever their weight.
"""

import math
from dataclasses import dataclass

from fedloom.core.protocols import Params
from fedloom.server.combine.coordinates import trimmed
from fedloom.server.combine.robust import Robust, Updates
from fedloom.server.combine.sums import relative

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
