"""Runs beside each other: one table, and one page with quality against bytes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedloom.core.files import write_atomic
from fedloom.core.metrics import Metric
from fedloom.report import figures
from fedloom.report.figures import Line
from fedloom.report.page import bytes_line, render
from fedloom.report.run_folder import Results, by_name, read_results
from fedloom.tracking.metric_format import duration, human_bytes, quality, shown

_LOG = 20
"""How many times more bytes the most talkative run must take for a logarithmic axis."""


_TERMINAL = (0, 1, 2, 4, 6, 7, 8)


@dataclass(frozen=True)
class Compared:
    """Runs beside each other by one metric."""

    metric: Metric
    runs: Mapping[str, Results]
    """By name; those of one name are told apart by their folders."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def page(self) -> dict[str, Any]:
        """Return what the template `section_compare` takes."""
        return {
            "name": f"{self.metric.title} of {len(self.runs)} runs",
            "head": self.head,
            "rows": self.rows,
            "legend": [
                {"label": name, "color": at % len(figures.SERIES)}
                for at, name in enumerate(self.runs)
            ],
            "panels": _panels(self.metric, self.runs),
        }


def compared(folders: Sequence[Path], metric: str | None = None) -> Compared:
    """Return the runs beside each other; arguments and errors are those of `compare`."""
    runs = by_name([read_results(folder) for folder in dict.fromkeys(folders)])
    chosen = _metric(runs, metric)
    rows = [_row(name, run, chosen, runs) for name, run in runs.items()]
    return Compared(chosen, runs, _columns(chosen, runs), rows)


def compare(
    folders: Sequence[Path], *, out: Path | None = None, metric: str | None = None
) -> Table:
    """Return a table of the runs, and write a page with table and figures.

    Args:
        folders: Run directories.
        out: Where the page goes; None writes none.
        metric: As in metrics.jsonl; None takes exact match where all runs have it, else a loss.

    Raises:
        ValueError: where the runs have no metric in common, not the one asked for, or do not mean the same by it.
    """
    found = compared(folders, metric)
    head, rows = found.head, found.rows
    if out is not None:
        write_atomic(out, render("compare.html.j2", found.page()).encode())
    title = f"{found.metric.title} of {len(found.runs)} runs"
    table = Table(title=title, title_justify="left")
    # What fits a terminal of 80 columns; the page has the rest.
    for at in _TERMINAL:
        style = "bold" if head[at] == "after" else ""
        table.add_column(head[at], justify="right" if at > 1 else "left", style=style)
    for row in rows:
        table.add_row(*(Text(row[at]) for at in _TERMINAL))
    return table


def _metric(runs: Mapping[str, Results], asked: str | None) -> Metric:
    name = _name(runs, asked)
    meant = {run.metric(name).better for run in runs.values()}
    if len(meant) > 1:
        raise ValueError(
            f"the runs do not agree on what is better of {name} ({', '.join(sorted(meant))}); compare another metric"
        )
    return next(iter(runs.values())).metric(name)


def _name(runs: Mapping[str, Results], asked: str | None) -> str:
    measured = [run.metrics() for run in runs.values()]
    shared = [name for name in measured[0] if all(name in each for each in measured)]
    if asked is None:
        found = quality(measured)
        if found is None:
            raise ValueError(
                f"the runs {', '.join(runs)} have no loss or exact match in common; "
                f"name a metric that all have with --metric"
            )
        return found
    if asked not in shared:
        known = ", ".join(n for n in shared if n.startswith(("test/", "validation/", "train/")))
        raise ValueError(f"--metric must be one that all runs have ({known}), got {asked!r}")
    return asked


def _level(metric: Metric, runs: Mapping[str, Results]) -> float | None:
    """Return what the least good of the runs ends with; None where neither way is better."""
    finals = [value[-1][1] for run in runs.values() if (value := run.history.of(metric.name))]
    if metric.better == "none":
        return None
    return max(finals, key=metric.cost, default=math.nan)


def _columns(metric: Metric, runs: Mapping[str, Results]) -> list[str]:
    reached = f"bytes to {shown(metric, _level(metric, runs))}"
    return [
        "run",
        "algorithm",
        "rounds",
        "before",
        "after",
        "best",
        "up",
        "down",
        reached,
        "training",
    ]


def _row(name: str, run: Results, metric: Metric, runs: Mapping[str, Results]) -> list[str]:
    before, after = run.ends(metric.name)
    summary, total = run.summary, run.total_bytes()
    level, best = _level(metric, runs), run.history.best(metric.name)
    reached = [
        at
        for at, value in run.history.of(metric.name)
        if level is not None and metric.cost(value) <= metric.cost(level)
    ]
    return [
        name,
        str(summary.get("algorithm", "")),
        f"{run.history.lines[-1]['round']:.0f}",
        shown(metric, before),
        shown(metric, after),
        shown(metric, best[1] if best else None),
        human_bytes(run.history.total("comm/upload_bytes")),
        human_bytes(run.history.total("comm/download_bytes")),
        human_bytes(total[reached[0]]) if reached else "\u2013",
        duration(summary["train_seconds"]) if "train_seconds" in summary else "\u2013",
    ]


def _panels(metric: Metric, runs: Mapping[str, Results]) -> list[str]:
    by_bytes: list[Line] = []
    by_round: list[Line] = []
    for at, (name, run) in enumerate(runs.items()):
        by_round.append(Line(name, run.history.of(metric.name), at))
        line = bytes_line(name, run, metric.name, at)
        if line is not None:
            by_bytes.append(line)
    most = [line.points[-1][0] for line in by_bytes if not line.level]
    log = bool(most) and max(most) > _LOG * min(most)
    if log:
        # A logarithm has no place for the zero bytes before training.
        by_bytes = [_after_start(line) for line in by_bytes]
    drawn: list[tuple[Any, str]] = [
        (partial(figures.quality_by_bytes, metric, by_bytes, log=log), "by bytes"),
        (partial(figures.curve, metric, by_round), "over the rounds"),
    ]
    return [figures.svg(draw, f"{metric.title} {what}") for draw, what in drawn]


def _after_start(line: Line) -> Line:
    if line.level:
        return line
    points = [point for point in line.points if point[0] > 0]
    return Line(line.label, points, line.color)
