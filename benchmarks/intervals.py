"""Means over seeds with their 95 % confidence intervals, by Student's t."""

import math
import statistics
from collections.abc import Sequence

_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
"""The 97.5 % points, by the number of values."""


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the interval of the mean; not a number for a single value."""
    if len(values) < 2:
        return math.nan
    far = _STUDENT.get(len(values), 1.96)
    return far * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and half-width."""
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
