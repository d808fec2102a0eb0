"""The page of a plan of runs: its table, what it cost, and quality against bytes with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedloom.core.metrics import Metric
from fedloom.report.figures import MUTED, SERIES, WIDE, heading, quality_axis, svg
from fedloom.report.page import render
from fedloom.tracking.metric_format import human_bytes

Cells = Sequence[tuple[str, bool]]
"""Texts, each with whether it is the best of its column."""


@dataclass(frozen=True, slots=True)
class Point:
    """A row in the picture."""

    name: str
    bytes: float
    value: float
    low: float | None
    high: float | None


def bench_page(
    title: str,
    about: str,
    head: Sequence[str],
    rows: Sequence[Cells],
    notes: Sequence[str],
    *,
    costs: tuple[Sequence[str], Sequence[Cells], str],
    points: Sequence[Point],
    metric: Metric | None,
) -> str:
    """Return the page.

    Args:
        title: Of the plan.
        about: Its description.
        head: Heads of the table's columns.
        rows: Its rows.
        notes: What stands under it.
        costs: Heads, rows and machine of the second table.
        points: What is drawn.
        metric: Of the points' values.
    """
    panels = []
    if metric is not None and len(points) > 1:
        panels.append(
            svg(lambda: by_bytes(metric, points), f"{metric.title} by bytes, with intervals")
        )
    page = {
        "name": title,
        "about": about,
        "tables": [
            {"title": "Runs", "head": head, "rows": rows, "notes": notes},
            {"title": "Costs", "head": costs[0], "rows": costs[1], "notes": [costs[2]]},
        ],
        "panels": panels,
    }
    return render("bench.html.j2", page)


def by_bytes(metric: Metric, points: Sequence[Point]) -> Figure:
    """Draw every row's mean over the bytes it took, with its interval."""
    figure = Figure(figsize=(WIDE, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    for at, point in enumerate(points):
        color = SERIES[at % len(SERIES)]
        if point.low is not None and point.high is not None:
            axes.plot([point.bytes] * 2, [point.low, point.high], color=color, linewidth=1.4)
        axes.plot([point.bytes], [point.value], "o", color=color, markersize=6)
        axes.annotate(
            point.name,
            (point.bytes, point.value),
            # Rows of as many bytes often stand close together.
            xytext=(7, 5 if at % 2 else -11),
            textcoords="offset points",
            color=MUTED,
        )
    least, most = (limit(point.bytes for point in points) for limit in (min, max))
    axes.set_xlim(least / 1.6, most * 4)
    heading(figure, f"{metric.title} by bytes")
    axes.set_xlabel("bytes sent and received, all clients")
    quality_axis(axes, metric)
    return figure
