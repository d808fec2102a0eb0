"""Pictures of an audit: each number beside what chance would give, a panel for each measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedloom.report.figures import MUTED, SERIES, WIDE, png

_ROW, _HEAD, _FOOT = 0.19, 0.42, 0.30
"""Inches: of a line, above a panel's first and below its last."""
_MOST = 40
"""Lines that a panel has room for; of more the largest are drawn."""
_LEFT = 0.34
"""Share of the width that names take."""


@dataclass(frozen=True)
class Leak:
    """A number of an audit as it is drawn."""

    measure: str
    """Numbers of one measure share a panel."""
    label: str
    value: float
    chance: float
    """Where it would be if nothing were revealed."""
    interval: tuple[float, float] | None = None


def leaks_picture(leaks: Sequence[Leak]) -> bytes:
    """Return the picture of all numbers, at least one, as PNG."""
    panels: dict[str, list[Leak]] = {}
    for leak in leaks:
        panels.setdefault(leak.measure, []).append(leak)
    shown = {name: sorted(own, key=lambda x: -x.value)[:_MOST] for name, own in panels.items()}
    return png(partial(_figure, {n: [x for x in panels[n] if x in shown[n]] for n in panels}))


def _figure(panels: Mapping[str, Sequence[Leak]]) -> Figure:
    heights = [_HEAD + _ROW * len(own) + _FOOT for own in panels.values()]
    total = sum(heights)
    figure, top = Figure(figsize=(WIDE, total)), total
    for (name, own), height in zip(panels.items(), heights, strict=True):
        inside = (_LEFT, (top - height + _FOOT) / total, 0.63, _ROW * len(own) / total)
        _draw(figure.add_axes(inside), own)
        figure.text(0.01, (top - 0.24) / total, name, fontsize=9, fontweight="bold", va="center")
        top -= height
    return figure


def _draw(axes: Axes, leaks: Sequence[Leak]) -> None:
    places = range(len(leaks))
    for at, leak in zip(places, leaks, strict=True):
        if leak.interval is not None:
            axes.hlines(at, *leak.interval, color=SERIES[0], linewidth=1.2)
        axes.vlines(leak.chance, at - 0.35, at + 0.35, color=MUTED, linewidth=1.2)
    axes.plot([leak.value for leak in leaks], places, "o", color=SERIES[0])
    axes.set_yticks(places, [leak.label for leak in leaks])
    axes.set_ylim(len(leaks) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    ends = [end for x in leaks for end in (x.value, x.chance, *(x.interval or ()))]
    if min(ends) >= 0 and max(ends) <= 1:
        axes.set_xlim(-0.02, 1.02)
