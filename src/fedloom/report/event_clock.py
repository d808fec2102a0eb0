"""Pictures of rounds without waiting: quality over virtual time beside other runs, and how old the answers were."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedloom.core.metrics import Metric
from fedloom.report import figures
from fedloom.report.figures import Line
from fedloom.report.run_folder import Results

_SECONDS = "time/virtual_seconds"


def clock_section(
    runs: Sequence[tuple[str, Results]], metric: Metric | None
) -> dict[str, Any] | None:
    """Return what is told of virtual time and of staleness; None for a run with neither."""
    own, drawn = runs[0][1], list[str]()
    if not (own.history.of(_SECONDS) or own.history.of("server/staleness")):
        return None
    # Sites have a time of their own.
    names = dict.fromkeys(
        name
        for name in ("validation/loss", "test/loss", metric and metric.name)
        if name and own.history.of(name) and own.history.of(_SECONDS)
    )
    for name in names:
        known = own.metric(name)
        lines = [time_line(label, run, name, at) for at, (label, run) in enumerate(runs)]
        draw = partial(figures.quality_by_time, known, [line for line in lines if line])
        drawn.append(figures.svg(draw, f"{known.title} by virtual time"))
    ages = [
        Line(label, own.history.of(name), at, dashed=at > 0)
        for at, (label, name) in enumerate(
            (("mean", "server/staleness"), ("largest", "server/max_staleness"))
        )
        if own.history.of(name)
    ]
    if ages:
        draw = partial(figures.curve, own.metric("server/staleness"), ages)
        drawn.append(figures.svg(draw, "Staleness of the answers, mean and largest of a step"))
    stale = int(own.history.total("comm/num_stale"))
    return {
        "figures": drawn,
        "buffered": bool(ages),
        "dropped": stale,
        "rows": [
            (label, f"{run.history.total(_SECONDS):.4g} s")
            for label, run in runs
            if run.history.of(_SECONDS)
        ],
    }


def time_line(label: str, run: Results, metric: str, color: int) -> Line | None:
    """Return a metric over the virtual seconds so far; None of a run without a clock, or without the metric."""
    passed, now = {0: 0.0}, 0.0
    for number, seconds in run.history.of(_SECONDS):
        now += seconds
        passed[number] = now
    points = [(passed[n], value) for n, value in run.history.of(metric) if n in passed]
    return Line(label, points, color, dashed=color > 0) if len(points) > 1 else None
