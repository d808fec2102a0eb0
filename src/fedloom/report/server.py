"""What the server told of its rounds, as pictures: which entries it sends, what sums of factors lack, how far clients
go their own way, how much privacy is spent."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedloom.report import figures
from fedloom.report.run_folder import Results
from fedloom.rounds.privacy import EPSILON, privacy_record

_DENSITY, _TOTAL = "server/density/", "server/download_density"
_LACKING, _FROZEN = "server/aggregation_error", "server/frozen_rank"
_OWN = "server/mu"
_COLORS = {"A": 0, "B": 1, "": 2}
"""Of SERIES, by factor."""
_DEEPEST = 0.8
"""Opacity of the largest share, so that numbers can be read on it."""
_CELLS = 16
"""Layers up to which every cell holds its number."""
_ROW = 0.23

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, order=True)
class TensorPlace:
    """Where in a model a tensor lies, read from its name."""

    factor: str
    """A or B of LoRA; empty for others."""
    module: str
    layer: int
    """-1 outside the layers."""


def place_of(name: str) -> TensorPlace:
    """Return where `...layers.3.self_attn.q_proj.lora_A.weight` lies: A, q_proj, 3."""
    layer = re.search(r"\.(\d+)\.", name)
    lora = re.search(r"([^.]+)\.lora_([AB])\b", name)
    plain = re.sub(r"\.(weight|bias|default)\b", "", name).rpartition(".")[2]
    module, factor = lora.groups() if lora else (plain, "")
    return TensorPlace(factor, module, int(layer[1]) if layer else -1)


def server_sections(own: Results) -> dict[str, Any]:
    """Return what the sections of the page show that are of the server; None for what a run did not tell."""
    return {
        "sent": _sent(own),
        "factors": _factors(own),
        "own_way": _own_way(own),
        "privacy": _privacy(own),
    }


def _sent(own: Results) -> dict[str, Any] | None:
    series = {
        name.removeprefix(_DENSITY): own.history.of(name)
        for name in own.metrics()
        if name.startswith(_DENSITY) and own.history.of(name)
    }
    if not series:
        return None
    number = max(points[-1][0] for points in series.values())
    shares: dict[TensorPlace, list[float]] = {}
    for name, points in series.items():
        shares.setdefault(place_of(name), []).append(points[-1][1])
    means = {place: sum(values) / len(values) for place, values in shares.items()}
    curves = partial(_curves, series, own.history.of(_TOTAL))
    return {
        "curves": figures.svg(curves, "Share of every tensor that is sent, over the rounds"),
        "map": figures.svg(partial(_map, means, number), "Share sent, by layer and module"),
        "legend": [
            {"label": f"each of LoRA's {kind}" if kind else "each tensor", "color": _COLORS[kind]}
            for kind in sorted({place.factor for place in means})
        ],
    }


def _factors(own: Results) -> dict[str, str] | None:
    lacking, frozen = own.history.of(_LACKING), own.history.of(_FROZEN)
    if not lacking:
        return None
    last = f"{100 * lacking[-1][1]:.2g} % in round {lacking[-1][0]:.0f}"
    beside = f"; the frozen pair has {frozen[-1][1]:.0f} columns" if frozen else ""
    title = "What the sum of clients has and the new adapter lacks"
    drawn = figures.svg(partial(_share, title, 1, lacking), "Aggregation error over the rounds")
    return {"figure": drawn, "said": f"{last}{beside}."}


def _own_way(own: Results) -> dict[str, str] | None:
    shares = own.history.of(_OWN)
    if not shares:
        return None
    last = f"{figures.per_cent(round(shares[-1][1], 3))} in round {shares[-1][0]:.0f}"
    title = "How far a client goes its own way (mu)"
    drawn = figures.svg(partial(_share, title, 0, shares), f"{title}, over the rounds")
    return {"figure": drawn, "said": f"{last}."}


def _privacy(own: Results) -> dict[str, str] | None:
    record = privacy_record(own.privacy, own.history)
    if record is None:
        return None
    draw, promised = partial(_epsilon, own.history.of(EPSILON)), record["epsilon"] is not None
    drawn = figures.svg(draw, "Epsilon over the rounds") if promised else ""
    return {"figure": drawn, "said": record["said"]}


def _curves(series: Mapping[str, Points], total: Points) -> Figure:
    figure, axes = figures.panel()
    for name, points in series.items():
        color = figures.SERIES[_COLORS[place_of(name).factor]]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=0.8, alpha=0.55)
    if total:
        axes.plot(*zip(*total, strict=True), color=figures.INK, linewidth=2.2)
    figures.heading(figure, "Share of entries sent, tensor by tensor")
    _rounds(axes)
    axes.yaxis.set_major_formatter(FuncFormatter(figures.per_cent))
    return figure


def _share(title: str, color: int, points: Points) -> Figure:
    figure, axes = _single(points, title, color=figures.SERIES[color])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(figures.per_cent))
    return figure


def _epsilon(points: Points) -> Figure:
    figure, _ = _single(points, "Epsilon spent", color=figures.SERIES[3])
    return figure


def _single(points: Points, title: str, *, color: str) -> tuple[Figure, Axes]:
    figure, axes = figures.panel()
    marker = "o" if len(points) <= 30 else None
    axes.plot(*zip(*points, strict=True), color=color, marker=marker)
    figures.heading(figure, title)
    _rounds(axes)
    return figure, axes


def _rounds(axes: Axes) -> None:
    figures.rounds_axis(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=figures.STEPS))
    axes.margins(x=0.03)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _map(means: dict[TensorPlace, float], number: int) -> Figure:
    """Draw a row a module, a column a layer, and LoRA's two factors side by side."""
    factors = sorted({place.factor for place in means})
    layers = sorted({place.layer for place in means})
    modules = list(dict.fromkeys(place.module for place in reversed(means)))
    height = 0.95 + _ROW * len(modules)
    figure = Figure(figsize=(figures.WIDE, height))
    left = 0.02 + 0.0085 * max(len(module) for module in modules)
    width = (0.985 - left) / len(factors)
    top = max(means.values())
    for at, factor in enumerate(factors):
        box = (left + at * width, 0.5 / height, width - 0.02, 1 - 0.95 / height)
        axes = figure.add_axes(box)
        for place, share in means.items():
            if place.factor == factor:
                spot = layers.index(place.layer), modules.index(place.module)
                _cell(axes, spot, share, top, numbered=len(layers) <= _CELLS)
        _dress(axes, layers, modules)
        if at:
            axes.set_yticklabels([])
        if factor:
            axes.set_title(f"LoRA's {factor}", fontsize=8, color=figures.MUTED, loc="left")
    deepest = "" if len(layers) <= _CELLS else f", deepest {100 * top:.3g}"
    title = f"Per cent of entries sent after round {number}, by layer and module{deepest}"
    figures.heading(figure, title)
    return figure


def _cell(axes: Axes, spot: tuple[int, int], share: float, top: float, *, numbered: bool) -> None:
    x, y = spot
    alpha = _DEEPEST * share / top if top else 0.0
    box = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=figures.SERIES[0], alpha=alpha)
    axes.add_patch(box)
    if numbered:
        axes.text(x, y, f"{100 * share:.3g}", ha="center", va="center_baseline", fontsize=7)


def _dress(axes: Axes, layers: Sequence[int], modules: Sequence[str]) -> None:
    axes.grid(visible=False)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(-0.5, len(modules) - 0.5)
    step = 1 if len(layers) <= 2 * _CELLS else 4
    names = ["none" if layer < 0 else str(layer) for layer in layers]
    axes.set_xticks(range(0, len(layers), step), names[::step])
    axes.set_yticks(range(len(modules)), modules)
    axes.set_xlabel("layer")
