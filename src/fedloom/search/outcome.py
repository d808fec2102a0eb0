"""What came of a search: its trials in their order, the best of them, and what quality took which bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from scipy.stats import spearmanr

from fedloom.core.metrics import Metric
from fedloom.search.space import Search
from fedloom.search.trials import Point


@dataclass(frozen=True)
class Trial:
    """One setting, and how far it came."""

    number: int
    settings: Mapping[str, str]
    folder: Path
    points: Sequence[Point]
    """The objective wherever it was measured."""
    rounds: int
    bytes: float
    """Of all messages, both ways."""
    rungs: Mapping[int, float]
    """The objective by the rounds that it was compared after."""
    is_over: bool
    """Whether it goes no farther."""
    failed: str = ""
    """Why it failed; empty where it did not."""
    test: Mapping[str, float] = field(default_factory=dict)
    """What was last measured of the test split."""
    epsilon: float | None = None
    """What its privacy came to."""
    seconds: float = 0.0

    @property
    def value(self) -> float | None:
        """Return the objective at the last rung it came to."""
        return self.rungs[max(self.rungs)] if self.rungs else None


@dataclass(frozen=True)
class Outcome:
    """All trials of a search."""

    title: str
    search: Search
    metric: Metric
    """The objective."""
    trials: Sequence[Trial]
    waiting: int
    """Trials that were not begun."""
    ended: str
    """Why the search ended before its end; empty where it did not, or is not at it."""
    rounds: int
    """Of a trial that comes to its end."""

    @property
    def ranked(self) -> Sequence[Trial]:
        """Return the trials, those that came farthest first, the best of them first; failures last."""

        def place(trial: Trial) -> tuple[bool, int, float, int]:
            reached, value = max(trial.rungs, default=0), trial.value
            cost = 0.0 if value is None else self.metric.cost(value)
            return bool(trial.failed), -reached, cost, trial.number

        return sorted(self.trials, key=place)

    @property
    def best(self) -> Trial | None:
        """Return the best of the trials that came farthest; None where none was compared."""
        first = next(iter(self.ranked), None)
        return first if first is not None and first.rungs and not first.failed else None

    @property
    def front(self) -> Sequence[tuple[Trial, Point]]:
        """Return where a trial was better than all that took no more bytes, fewest bytes first."""
        points = [
            (trial, point) for trial in self.trials if not trial.failed for point in trial.points
        ]
        found = list[tuple[Trial, Point]]()
        for trial, point in sorted(
            points, key=lambda each: (each[1].bytes, self._cost(each[1]), each[0].number)
        ):
            if not found or self._cost(point) < self._cost(found[-1][1]):
                found.append((trial, point))
        return found

    def agreements(self) -> Sequence[tuple[int, int, int, float]]:
        """Return of every two rungs that follow one another how many trials came to both, and Spearman's correlation.

        Without rungs, of the first measurement and the last; nothing where fewer than three trials have both.
        """
        courses = [trial.rungs for trial in self.trials if not trial.failed]
        if not self.search.halving:
            courses = [
                {p.round: p.value for p in (trial.points[0], trial.points[-1])}
                for trial in self.trials
                if not trial.failed and trial.points
            ]
        rungs = sorted({round for course in courses for round in course})
        found = list[tuple[int, int, int, float]]()
        for low, high in pairwise(rungs):
            both = [(c[low], c[high]) for c in courses if low in c and high in c]
            early, late = ([pair[at] for pair in both] for at in (0, 1))
            if len(both) >= 3 and len({*early}) > 1 and len({*late}) > 1:
                found.append((low, high, len(both), float(spearmanr(early, late).statistic)))
        return found

    def _cost(self, point: Point) -> float:
        return self.metric.cost(point.value)
