"""The page of a search: its trials, quality over bytes with the front of what is best, and what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedloom.core.metrics import Metric
from fedloom.report.figures import INK, MUTED, SERIES, WIDE, heading, quality_axis, svg
from fedloom.report.page import render
from fedloom.tracking.metric_format import human_bytes

_NAMED = 7
"""Courses with a colour and a name of their own: the first, which are the best."""


@dataclass(frozen=True, slots=True)
class Course:
    """A trial in the picture."""

    name: str
    points: Sequence[tuple[float, float]]
    """Bytes and quality."""


def search_page(
    title: str,
    about: str,
    tables: Sequence[Mapping[str, Any]],
    *,
    metric: Metric,
    courses: Sequence[Course],
    front: Sequence[tuple[float, float]],
) -> str:
    """Return the page.

    Args:
        title: Of the search.
        about: Its description.
        tables: Title, head, rows and notes of each.
        metric: Of the objective.
        courses: Of trials, the best first.
        front: Bytes and quality of what is best for its bytes.
    """
    said = f"{metric.title} by bytes, every trial, and the front"
    panels = [svg(lambda: by_bytes(metric, courses, front), said)] if courses else []
    return render(
        "bench.html.j2", {"name": title, "about": about, "tables": tables, "panels": panels}
    )


def by_bytes(
    metric: Metric, courses: Sequence[Course], front: Sequence[tuple[float, float]]
) -> Figure:
    """Draw every trial's course, and as steps what was best for no more bytes."""
    figure = Figure(figsize=(WIDE, 3.4))
    # Room for the heading, which no point is to lie under.
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.9))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    for at, course in reversed(list(enumerate(courses))):
        color = SERIES[at] if at < _NAMED else MUTED
        axes.plot(*zip(*course.points, strict=True), "o-", color=color, linewidth=1.2, markersize=4)
        if at < _NAMED:
            axes.annotate(
                course.name,
                course.points[-1],
                # Trials often end close together.
                xytext=(7, (5, -4, -13)[at % 3]),
                textcoords="offset points",
                color=color,
            )
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1, linestyle=":")
    spread = [bytes for course in courses for bytes, _ in course.points if bytes]
    if spread:
        axes.set_xlim(min(spread) / 1.3, max(spread) * 1.6)
    heading(figure, f"{metric.title} by bytes; dotted, the best for no more bytes")
    axes.set_xlabel("bytes sent and received, all clients")
    quality_axis(axes, metric)
    return figure
