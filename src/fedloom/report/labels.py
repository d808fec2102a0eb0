"""Results by the values of a label: a row a language beside the baselines, and every model on every language."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedloom.core.metrics import Metric
from fedloom.report import figures
from fedloom.report.run_folder import Results
from fedloom.tracking.metric_format import better, shown

_METRICS = ("exact_match", "accuracy", "chrf", "loss")
"""Of which the first that was measured is shown, the loss beside it, and users' own."""
_DEEPEST = 0.75
_ROW = 0.27


def labels_section(runs: Sequence[tuple[str, Results]]) -> dict[str, Any] | None:
    """Return what the section `by_label` of the page shows; None where evaluation.by names no label.

    Args:
        runs: The run itself, by the name it has on the page, then those beside it.
    """
    results = runs[0][1].by_label
    if not results.get("own"):
        return None
    table, found = runs[0][1].history.table, next(iter(results["own"].values()))
    measured = [name for name in _METRICS if name in found]
    own = [name for name in table.own if name in found]
    metrics = [table.of(name) for name in dict.fromkeys([measured[0], measured[-1], *own])]
    crossed = len(results["models"]) > 1 and bool(results["models"][0]["metrics"])
    return {
        "label": results["label"],
        "names": [name for name, _ in runs],
        "tables": [_table(runs, metric) for metric in metrics],
        "matrices": [
            figures.svg(
                partial(_matrix, results, metric), f"{metric.title} of every model on every value"
            )
            for metric in metrics
            if crossed
        ],
    }


def _table(runs: Sequence[tuple[str, Results]], metric: Metric) -> dict[str, Any]:
    """Return a row a value, one of their mean and one of the worst; the best run of each row is marked."""
    values, name = list(runs[0][1].by_label["own"]), metric.name
    columns = [
        {v: _number(m[name]) for v, m in run.by_label.get("own", {}).items() if name in m}
        for _, run in runs
    ]
    rows = [(value, [column.get(value) for column in columns]) for value in values]
    whole = [column if column.keys() >= set(values) else {} for column in columns]
    rows += [
        ("mean", [sum(column.values()) / len(column) if column else None for column in whole]),
        ("worst", [_worst(metric, list(column.values())) if column else None for column in whole]),
    ][: 1 if metric.better == "none" else 2]
    direction = f" ({better(metric)})" if better(metric) else ""
    return {
        "title": f"{metric.title}{direction}",
        "rows": [
            {"label": label, "cells": _marked(metric, cells), "sum": at >= len(values)}
            for at, (label, cells) in enumerate(rows)
        ],
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _worst(metric: Metric, values: Sequence[float]) -> float | None:
    if metric.better == "none":
        return None
    return math.nan if any(map(math.isnan, values)) else max(values, key=metric.cost)


def _marked(metric: Metric, cells: Sequence[float | None]) -> list[dict[str, Any]]:
    known = [cell for cell in cells if cell is not None and not math.isnan(cell)]
    best = min(known, key=metric.cost) if known and metric.better != "none" else None
    return [{"text": shown(metric, cell), "best": cell == best is not None} for cell in cells]


def _matrix(results: Mapping[str, Any], metric: Metric) -> Figure:
    """Draw a row a model, a column a value; the deeper the better, or the larger, and the deepest of each column bold."""
    models, values = results["models"], list(results["own"])
    height = 1.05 + _ROW * len(models)
    figure = Figure(figsize=(figures.WIDE, height))
    left = 0.03 + 0.0085 * max(len(model["name"]) for model in models)
    axes = figure.add_axes((left, 0.12 / height, 0.985 - left, 1 - 0.82 / height))
    sign = -1 if metric.better == "lower" else 1
    for x, value in enumerate(values):
        found = {
            y: result
            for y, model in enumerate(models)
            if (result := model["metrics"].get(value, {}).get(metric.name)) is not None
        }
        low, high = (end((sign * v for v in found.values()), default=0) for end in (min, max))
        for y, result in found.items():
            deep = _DEEPEST * (sign * result - low) / (high - low) if high > low else 0.0
            box = Rectangle((x - 0.49, y - 0.46), 0.98, 0.92, facecolor=figures.SERIES[0])
            box.set_alpha(deep)
            axes.add_patch(box)
            weight = "bold" if sign * result == high else "normal"
            axes.text(
                x, y, shown(metric, result), ha="center", va="center_baseline",
                fontsize=7, fontweight=weight,
            )  # fmt: skip
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(values)), values)
    axes.set_yticks(range(len(models)), [model["name"] for model in models])
    figures.heading(figure, f"{metric.title} of every model on every {results['label']}")
    return figure
