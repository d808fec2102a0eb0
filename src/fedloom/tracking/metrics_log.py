"""What metrics.jsonl says of the rounds so far: totals, best values and whether to stop, all without state of their own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.tracking.records import JsonLines, not_numbers

LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class MetricsLog:
    """The lines of metrics.jsonl, one a round; round 0 is before training."""

    lines: Sequence[Mapping[str, float]]

    @classmethod
    def read(cls, file: Path) -> "MetricsLog":
        """Read a file; its nulls are numbers that were not finite.

        Raises:
            ValueError: where a line is foreign, missing or there twice.
        """
        rows = JsonLines(file, not_numbers).rows()
        for expected, row in enumerate(rows):
            if row["round"] != expected:
                raise ValueError(
                    f"{file} has round {row['round']} where round {expected} should be: put it back as the run"
                    " wrote it"
                )
        return cls([{n: math.nan if v is None else v for n, v in row.items()} for row in rows])

    def total(self, metric: str) -> float:
        """Return the sum of a metric over the rounds."""
        return sum(value for _, value in self.of(metric))

    def of(self, metric: str) -> list[tuple[int, float]]:
        """Return (round, value) where the metric was measured and finite."""
        return [(at, value) for at, value in self._all(metric) if math.isfinite(value)]

    def ends(self, metric: str) -> tuple[float | None, float | None]:
        """Return a metric before training and when last measured, finite or not; None where it was not measured."""
        values = self._all(metric)
        if not values:
            return None, None
        return (values[0][1] if values[0][0] == 0 else None), values[-1][1]

    def _all(self, metric: str) -> list[tuple[int, float]]:
        return [(int(line["round"]), line[metric]) for line in self.lines if metric in line]

    def measured(self) -> list[str]:
        """Return the names of the evaluation metrics."""
        names = dict.fromkeys(n for line in self.lines for n in line)
        return [n for n in names if n.startswith(("validation/", "test/")) and "num_" not in n]

    def best(self, metric: str) -> tuple[int, float]:
        """Return the (round, value) that is best, the earliest of equals; the first where none is finite."""
        sign = 1 if lower_is_better(metric) else -1
        return min(self.of(metric), key=lambda at: sign * at[1], default=self._all(metric)[0])

    def should_stop(self, monitor: str, patience: int) -> bool:
        """Return whether the last `patience` evaluations brought nothing better."""
        values = self._all(monitor)
        if not patience or not values:
            return False
        best = self.best(monitor)[0]
        return sum(1 for number, _ in values if number > best) >= patience


def lower_is_better(metric: str) -> bool:
    """Return whether a smaller value of the metric is an improvement."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER
