"""How well scores tell two groups apart: area under the ROC curve, true positives at few false ones, and how sure that is.

The area is the chance that a score of the first group is above one of the second, ties counted as half (Mann and Whitney
1947). True positives at a false positive rate of 1 % are what Carlini, Chien, Nasr, Song, Terzis, Tramèr, S&P 2022
(arXiv:2112.03570) ask of membership inference beside it: who is found for certain, not on average. Intervals are percentiles
of a bootstrap over both groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedloom.core.randomness import derive

FALSE_POSITIVES = 0.01
"""The rate of false positives at which true ones are counted."""
RESAMPLES = 1000
"""Of each bootstrap."""
_LEVEL = 0.95

Scores = Sequence[float] | Tensor
"""Any number of them, on the CPU."""
_Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and where the middle 95 % of its bootstrap lie; of values at 0 or 1 they may all be the same."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        """Return it as in `0.71 [0.66, 0.76]`."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, slots=True)
class Separation:
    """How far two groups of scores are apart."""

    auc: Interval
    """0.5: not at all; 1: every score of the first group is above all of the second."""
    true_positives: Interval
    """Share of the first group above a threshold that at most 1 % of the second pass: none, of fewer than 100."""
    num_first: int
    num_second: int


def auc(first: Scores, second: Scores) -> float:
    """Return the chance that a score of the first group is above one of the second, ties counted as half.

    Raises:
        ValueError: where a group has no scores, or one that is not finite.
    """
    return _auc(*_checked(first, second))


def true_positives(first: Scores, second: Scores, *, at: float = FALSE_POSITIVES) -> float:
    """Return the share of the first group above the lowest threshold that at most a share `at` of the second passes.

    Of `n` scores of the second group at most floor(n * at) pass; ties with the threshold do not.
    """
    return _true_positives(*_checked(first, second), at)


def separation(first: Scores, second: Scores, *, seed: int) -> Separation:
    """Return both measures with their intervals.

    Args:
        first: Scores of those that should score high, such as members.
        second: Of the others.
        seed: Of the bootstrap.

    Raises:
        ValueError: where a group has no scores, or one that is not finite.
    """
    a, b = _checked(first, second)
    draws = np.random.Generator(np.random.PCG64(derive(seed, "bootstrap")))
    resampled = [
        (a[draws.integers(len(a), size=len(a))], b[draws.integers(len(b), size=len(b))])
        for _ in range(RESAMPLES)
    ]

    def interval(measure: Callable[[_Array, _Array], float]) -> Interval:
        values = [measure(*pair) for pair in resampled]
        low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        return Interval(measure(a, b), float(low), float(high))

    return Separation(
        interval(_auc),
        interval(lambda x, y: _true_positives(x, y, FALSE_POSITIVES)),
        len(a),
        len(b),
    )


def _checked(first: Scores, second: Scores) -> tuple[_Array, _Array]:
    groups = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    for name, group in zip(("first", "second"), groups, strict=True):
        if not group.size:
            raise ValueError(f"the {name} group has no scores: two groups are compared")
        if not np.isfinite(group).all():
            raise ValueError(f"the {name} group has scores that are not finite")
    return groups


def _auc(first: _Array, second: _Array) -> float:
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, side="left")
    up_to = np.searchsorted(ordered, first, side="right")
    return float((below + up_to).mean() / (2 * len(second)))


def _true_positives(first: _Array, second: _Array, at: float) -> float:
    # A hundredth of a hundred is one, whatever floating point makes of the product.
    passing = int(len(second) * at + 1e-9)
    threshold = np.sort(second)[len(second) - 1 - passing] if passing < len(second) else -np.inf
    return float((first > threshold).mean())
