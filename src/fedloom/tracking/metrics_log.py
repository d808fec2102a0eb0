"""What metrics.jsonl says of the rounds so far: totals, best values and whether to stop, all without state of their own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.core.metrics import MEASURED_SPLITS, METRICS, WEIGHTS, MetricTable
from fedloom.tracking.records import JsonLines, not_numbers


@dataclass(frozen=True)
class MetricsLog:
    """The lines of metrics.jsonl, one a round; round 0 is before training."""

    lines: Sequence[Mapping[str, float]]
    table: MetricTable = METRICS

    @classmethod
    def read(cls, file: Path, table: MetricTable = METRICS) -> "MetricsLog":
        """Read a file; its nulls are numbers that were not finite, and `table` knows the metrics of the run.

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
        lines = [{n: math.nan if v is None else v for n, v in row.items()} for row in rows]
        return cls(lines, table)

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
        weights = {f"{split}{name}" for split in MEASURED_SPLITS for name in WEIGHTS}
        return [n for n in names if n.startswith(MEASURED_SPLITS) and n not in weights]

    def check_measured(self, monitor: str) -> None:
        """Refuse to stop by what no evaluation measures.

        Raises:
            ValueError: that says what is measured.
        """
        if monitor not in (known := self.measured()):
            raise ValueError(f"run.monitor must be one of {', '.join(known)}, got {monitor!r}")

    def best(self, metric: str) -> tuple[int, float] | None:
        """Return the (round, value) that is best, the earliest of equals; the first where none is finite.

        None of a metric of which neither way is better.
        """
        known = self.table.of(metric)
        if known.better == "none":
            return None
        return min(self.of(metric), key=lambda at: known.cost(at[1]), default=self._all(metric)[0])

    def should_stop(self, monitor: str, patience: int) -> bool:
        """Return whether the last `patience` evaluations brought nothing better."""
        values = self._all(monitor)
        best = self.best(monitor) if patience and values else None
        if best is None:
            return False
        return sum(1 for number, _ in values if number > best[0]) >= patience
