"""Trials of a search: runs like any other, gone on with to a round, and read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedloom.experiment import session
from fedloom.models.shared import SharedBases
from fedloom.rounds.recipe_settings import Recipe
from fedloom.tracking.metrics_log import MetricsLog


@dataclass(frozen=True, slots=True)
class Point:
    """A trial after a round."""

    round: int
    value: float
    """Of the objective."""
    bytes: float
    """Of all messages so far, both ways."""


@dataclass(frozen=True)
class Course:
    """How a trial went so far, read from its folder."""

    lines: MetricsLog
    objective: str

    @classmethod
    def read(cls, folder: Path, recipe: Recipe, objective: str) -> "Course":
        """Return the course of the run in a folder, an empty one where there is none."""
        return cls(MetricsLog.read(folder / "metrics.jsonl", recipe.evaluation.table), objective)

    @property
    def rounds(self) -> int:
        """Return how many are done."""
        return max((int(line["round"]) for line in self.lines.lines), default=0)

    @property
    def bytes(self) -> float:
        """Return the bytes of all messages, both ways."""
        return sum(self.lines.total(f"comm/{way}_bytes") for way in ("upload", "download"))

    @property
    def points(self) -> Sequence[Point]:
        """Return the objective wherever it was measured after a round of training and finite."""
        spent, found = 0.0, list[Point]()
        for line in self.lines.lines:
            spent += sum(line.get(f"comm/{way}_bytes", 0.0) for way in ("upload", "download"))
            value = line.get(self.objective, math.nan)
            if line["round"] and math.isfinite(value):
                found.append(Point(int(line["round"]), value, spent))
        return found

    @property
    def final(self) -> Mapping[str, float]:
        """Return what was last measured of the test split, by which nothing is chosen."""
        names = [name for name in self.lines.measured() if name.startswith("test/")]
        ends = {name: self.lines.ends(name)[1] for name in names}
        return {name: value for name, value in ends.items() if value is not None}

    def value(self, until: int | None = None) -> float | None:
        """Return the objective after a round, or after the last if none is given; None where it was not measured."""
        at = self.rounds if until is None else until
        found = [line for line in self.lines.lines if line["round"] == at > 0]
        return found[0].get(self.objective) if found else None


def go_on(
    recipe: Recipe, folder: Path, *, until: int, console: Console, bases: SharedBases
) -> None:
    """Train a trial to a round, from where its folder stands, and measure it there."""
    with (
        bases.lent(recipe.shares_base, folder) as load,
        session(recipe, folder, console=console, bases=load) as going,
    ):
        for _ in going.rounds(until):
            pass
