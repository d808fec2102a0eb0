"""Pooled clusters as pictures: how much of its own way each went, and in which layers clusters differ by more than noise."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedloom.clustering.pooling import ALIKE
from fedloom.report import figures
from fedloom.report.run_folder import Results

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_ALIKE = 0.05
"""Clusters that all go less of their own way than this share nearly everything."""
_MOST = 60
"""Bars that are drawn."""

Variances = Mapping[str, Mapping[str, float]]


def pooled_panels(own: Results, colors: Mapping[str, int]) -> list[str]:
    """Return the pictures of a run whose clusters are pooled; none of any other.

    Args:
        own: The run.
        colors: Of each cluster there ever was.
    """
    lines = _lines(own, colors)
    if not lines:
        return []
    metric = replace(
        own.metric("server/lambda"), title="How far each cluster goes its own way (lambda)"
    )
    draw = partial(figures.curve, metric, lines)
    panels = [figures.svg(draw, "How much of its own way each cluster goes, by round")]
    layers = by_layer(own.clusters.get("variances", {}))
    if layers:
        panels.append(figures.svg(partial(_layers, layers), "What is shared, by layer"))
    return panels


def pooled_sentences(own: Results) -> list[str]:
    """Return what is shared and what is not, in words; nothing of a run whose clusters are not pooled."""
    last = {n: p[-1][1] for n in own.clusters["assignment"].values() if (p := _points(own, n))}
    if not last:
        return []
    low, high = min(last.values()), max(last.values())
    many = f"{len(last)} clusters" if len(last) > 1 else "the one cluster"
    alike = own.history.of("server/rounds_alike")
    if high < ALIKE and alike and not alike[-1][1]:
        unknown = (
            f"How much {many} should share is not known yet, so all clients were taught alike:"
        )
        return [
            f"{unknown} only rounds tell in which several clusters reply, one with two clients or more, and nobody changes clusters."
        ]
    if high < _ALIKE:
        said = f"{many}, alike enough to share nearly all: each last went {figures.per_cent(round(high, 3))} of its own"
        lines = [f"{said[:1].upper()}{said[1:]} way or less (lambda), and else with all clients."]
    else:
        span = " to ".join(dict.fromkeys(figures.per_cent(round(x, 3)) for x in (low, high)))
        lines = [
            f"How much is shared is estimated: {many} last went {span} of their own way (lambda), and else with all clients."
        ]
    if alike and alike[-1][1] > 1:
        rarer = (
            ", and the longer it lasts the more rarely clients are probed"
            if own.clusters.get("similarity")
            else ""
        )
        lines.append(
            f"For {alike[-1][1]:.0f} rounds in a row it was less than {figures.per_cent(ALIKE)}{rarer}."
        )
    variances = own.clusters.get("variances", {})
    noise = sum(each["noise"] for each in variances.values())
    spread = sum(each["spread"] for each in variances.values())
    if noise + spread > 0:
        part = figures.per_cent(round(spread / (noise + spread), 3))
        lines.append(
            f"Of the squared distances between clients' updates, {part} are between clusters; the rest is each client's own."
        )
    if lasting := own.history.of("server/lasting"):
        part = figures.per_cent(round(lasting[-1][1], 3))
        lines.append(
            f"Of the latter {part} come back every round; the rest averages out over rounds."
        )
    gain = own.history.of("server/gain")
    if gain and gain[-1][1] > 1:
        lines.append(
            f"What clusters wanted of their own way they wanted again, so they go it further than that alone says: by a gain of {gain[-1][1]:.3g}."
        )
    return lines


def by_layer(variances: Variances) -> dict[str, float]:
    """Return the part of what clients differ by that is their clusters', by layer; by tensor where none has a number."""
    sums: dict[str, list[float]] = {}
    for name, each in variances.items():
        found = _LAYER.search(name)
        total = sums.setdefault(found[1] if found else name.rpartition(".")[0] or name, [0.0, 0.0])
        total[0] += each["spread"]
        total[1] += each["noise"]
    ordered = sorted(sums, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
    return {n: sums[n][0] / sum(sums[n]) if sum(sums[n]) else 0.0 for n in ordered}


def _points(own: Results, cluster: str) -> Sequence[tuple[int, float]]:
    return own.history.of(f"server/{cluster}/lambda")


def _lines(own: Results, colors: Mapping[str, int]) -> list[figures.Line]:
    return [
        figures.Line(cluster, points, color)
        for cluster, color in colors.items()
        if (points := _points(own, cluster))
    ]


def _layers(layers: Mapping[str, float]) -> Figure:
    figure, axes = figures.panel()
    shown = dict(list(layers.items())[:_MOST])
    axes.bar(range(len(shown)), list(shown.values()), color=figures.SERIES[0], width=0.75)
    axes.set_xlim(-0.7, len(shown) - 0.3)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=figures.STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(figures.per_cent))
    numbers = all(name.isdigit() for name in shown)
    step = max(1, len(shown) // 12) if numbers else 1
    ticks = range(0, len(shown), step)
    names = [list(shown)[at] for at in ticks]
    if numbers or max(map(len, names)) * len(names) <= _MOST:
        axes.set_xticks(list(ticks), names)
    else:
        axes.set_xticks([])
    axes.set_xlabel("layer" if numbers else "tensors")
    figures.heading(figure, "Part of clients' differences that is their clusters'")
    return figure
