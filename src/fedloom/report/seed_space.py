"""A run in seed space as pictures: how its coefficients grew, and which seeds are likely."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.report import figures
from fedloom.report.run_folder import Results
from fedloom.tracking.metric_format import duration

_NORM, _LARGEST = "server/coefficient_norm", "server/coefficient_max"
_WALKED, _EFFECTIVE = "server/walked", "server/effective_seeds"
_BINS = 61

Points = Sequence[tuple[float, float]]


def seeds_section(own: Results) -> dict[str, Any] | None:
    """Return what the section `seeds` of the page shows; None for a run in another space."""
    norm, largest = own.history.of(_NORM), own.history.of(_LARGEST)
    if not norm:
        return None
    panels = [
        _panel("Size of the coefficients over the rounds", _sizes, norm, largest)
        | {"legend": [_entry("norm", 0), _entry("largest", 1)]}
    ]
    num_seeds = own.seeds.get("num_seeds")
    walked, effective = own.history.of(_WALKED), own.history.of(_EFFECTIVE)
    if num_seeds:
        part = [(number, value / num_seeds) for number, value in effective]
        legend = [
            _entry("walked along", 2),
            *([_entry("drawn from, in effect", 4)] if part else []),
        ]
        panels.append(
            _panel("Share of the seeds over the rounds", _shares, walked, part) | {"legend": legend}
        )
    models = own.seeds.get("models") or []
    if models:
        legend = [_entry(model["name"], at) for at, model in enumerate(models) if len(models) > 1]
        panels.append(_panel("Coefficients at the end", _histogram, models) | {"legend": legend})
    chances = own.seeds.get("probabilities")
    if chances:
        panels.append(_panel("Chances of the seeds", _chances, chances) | {"legend": []})
    return {"said": _sentences(own, norm, largest, walked), "panels": panels}


def _sentences(own: Results, norm: Points, largest: Points, walked: Points) -> str:
    sentences = [f"After round {norm[-1][0]}, the coefficients' norm is {norm[-1][1]:.3g}"]
    sentences[0] += f" and the largest is {largest[-1][1]:.3g}." if largest else "."
    if "num_seeds" in own.seeds and walked:
        sentences.append(
            f"Of {own.seeds['num_seeds']:,} seeds, {figures.per_cent(walked[-1][1])} were walked along."
        )
    if "rebuild" in own.seeds:
        took = duration(own.seeds["rebuild"]["seconds"])
        sentences.append(f"Building the model from them takes {took} here.")
    return " ".join(sentences)


def _entry(label: str, color: int) -> dict[str, Any]:
    return {"label": label, "color": color, "dashed": False}


def _panel(label: str, draw: Any, *given: Any) -> dict[str, Any]:
    return {"figure": figures.svg(partial(draw, *given), label)}


def _sizes(norm: Points, largest: Points) -> Figure:
    figure, axes = figures.panel()
    for points, color in ((norm, 0), (largest, 1)):
        if points:
            _line(axes, points, color)
    if all(value > 0 for _, value in [*norm, *largest]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    figures.rounds_axis(axes)
    figures.heading(figure, "Size of the coefficients")
    return figure


def _shares(walked: Points, effective: Points) -> Figure:
    figure, axes = figures.panel()
    for points, color in ((walked, 2), (effective, 4)):
        if points:
            _line(axes, points, color)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(FuncFormatter(figures.per_cent))
    figures.rounds_axis(axes)
    figures.heading(figure, "Share of the seeds")
    return figure


def _histogram(models: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = figures.panel()
    everything = [value for model in models for value in model[COEFFICIENTS]]
    reach = max(map(abs, everything)) or 1.0
    edges = [reach * (2 * at / _BINS - 1) for at in range(_BINS + 1)]
    for at, model in enumerate(models):
        color = figures.SERIES[at % len(figures.SERIES)]
        axes.hist(model[COEFFICIENTS], edges, histtype="step", color=color, linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=figures.STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=figures.STEPS, integer=True))
    axes.set_xlabel("coefficient")
    figures.heading(figure, "How many seeds have which coefficient")
    return figure


def _chances(chances: Sequence[float]) -> Figure:
    figure, axes = figures.panel()
    times = [chance * len(chances) for chance in sorted(chances, reverse=True)]
    axes.axhline(1.0, color=figures.MUTED, linestyle="--", linewidth=1.0)
    axes.plot(range(1, len(times) + 1), times, color=figures.SERIES[3])
    axes.set_ylim(0, 1.08 * max(*times, 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=figures.STEPS, integer=True))
    axes.set_xlabel("seeds, from the likeliest")
    figures.heading(figure, "Chance of a seed, as a multiple of the uniform one")
    return figure


def _line(axes: Any, points: Points, color: int) -> None:
    marker = "o" if len(points) <= 30 else None
    axes.plot(*zip(*points, strict=True), color=figures.SERIES[color], marker=marker)
    axes.margins(x=0.03)


def _short(value: float, _: int | None = None) -> str:
    """Return a tick label: 0.002, 1e-06."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}", 1)
