"""Results by the values of a label: a row a language beside the baselines, and every model on every language."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedloom.report import figures
from fedloom.report.run_folder import Results
from fedloom.tracking.metric_format import better, shown, title
from fedloom.tracking.metrics_log import lower_is_better

_METRICS = ("exact_match", "accuracy", "chrf", "loss")
"""Of which the first that was measured is shown, and the loss beside it."""
_DEEPEST = 0.75
_ROW = 0.27


def labels_section(runs: Sequence[tuple[str, Results]]) -> dict[str, Any] | None:
    """Return what the section `by_label` of the page shows; None where evaluation.by names no label.

    Args:
        runs: The run itself, by the name it has on the page, then those beside it.
    """
    told = runs[0][1].by_label
    if not told.get("own"):
        return None
    measured = [metric for metric in _METRICS if metric in next(iter(told["own"].values()))]
    metrics = list(dict.fromkeys([measured[0], measured[-1]]))
    crossed = len(told["models"]) > 1 and bool(told["models"][0]["metrics"])
    return {
        "label": told["label"],
        "names": [name for name, _ in runs],
        "tables": [_table(runs, metric) for metric in metrics],
        "matrices": [
            figures.svg(
                partial(_matrix, told, metric), f"{title(metric)} of every model on every value"
            )
            for metric in metrics
            if crossed
        ],
    }


def _table(runs: Sequence[tuple[str, Results]], metric: str) -> dict[str, Any]:
    """Return a row a value, one of their mean and one of the worst; the best run of each row is marked."""
    values = list(runs[0][1].by_label["own"])
    columns = [
        {v: _number(m[metric]) for v, m in run.by_label.get("own", {}).items() if metric in m}
        for _, run in runs
    ]
    rows = [(value, [column.get(value) for column in columns]) for value in values]
    whole = [column if column.keys() >= set(values) else {} for column in columns]
    rows += [
        ("mean", [sum(column.values()) / len(column) if column else None for column in whole]),
        ("worst", [_worst(metric, list(column.values())) if column else None for column in whole]),
    ]
    return {
        "title": f"{title(metric)} ({better(metric)})",
        "rows": [
            {"label": label, "cells": _marked(metric, cells), "sum": at >= len(values)}
            for at, (label, cells) in enumerate(rows)
        ],
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _worst(metric: str, values: Sequence[float]) -> float:
    if any(map(math.isnan, values)):
        return math.nan
    return max(values) if lower_is_better(metric) else min(values)


def _marked(metric: str, cells: Sequence[float | None]) -> list[dict[str, Any]]:
    known = [cell for cell in cells if cell is not None and not math.isnan(cell)]
    best = (min if lower_is_better(metric) else max)(known) if known else None
    return [{"text": shown(metric, cell), "best": cell == best is not None} for cell in cells]


def _matrix(told: Mapping[str, Any], metric: str) -> Figure:
    """Draw a row a model, a column a value; the deeper the better, and the best of each column framed."""
    models, values = told["models"], list(told["own"])
    height = 1.05 + _ROW * len(models)
    figure = Figure(figsize=(figures.WIDE, height))
    left = 0.03 + 0.0085 * max(len(model["name"]) for model in models)
    axes = figure.add_axes((left, 0.12 / height, 0.985 - left, 1 - 0.82 / height))
    sign = -1 if lower_is_better(metric) else 1
    for x, value in enumerate(values):
        found = {
            y: result
            for y, model in enumerate(models)
            if (result := model["metrics"].get(value, {}).get(metric)) is not None
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
    figures.heading(figure, f"{title(metric)} of every model on every {told['label']}")
    return figure
