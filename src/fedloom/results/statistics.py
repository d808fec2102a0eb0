"""Means and shares with intervals, and differences of runs that share a seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and where it may lie with a confidence of 95 %."""

    mean: float
    low: float | None
    """None where one value says nothing of how far others would be."""
    high: float | None
    count: int
    """Values, such as those of seeds or clients, that it is the mean of."""

    @property
    def half(self) -> float | None:
        """Return half the width of an interval that has the mean in its middle."""
        return None if self.high is None else self.high - self.mean


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of values and its interval by Student's t."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Estimate(mean, None, None, len(values))
    far = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    half = far * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def of_share(share: float, num: int) -> Estimate:
    """Return a share of so many items with Wilson's interval, which says what one run tells of more items alike."""
    return Estimate(share, *wilson(round(share * num), num), 1)


def wilson(right: int, num: int) -> tuple[float, float]:
    """Return Wilson's interval of the share of so many items that are right."""
    from scipy.stats import binomtest

    found = binomtest(right, num).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """Return how far values are above others, seed by seed; None where no seed has both."""
    both = sorted(own.keys() & other.keys())
    return mean_of([own[seed] - other[seed] for seed in both]) if both else None
