"""The pictures of report and comparison, as SVG that follows the page's light or dark colours."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from typing import Any
from warnings import catch_warnings, filterwarnings

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fedloom.core.metrics import Metric
from fedloom.core.protocols import ClientId
from fedloom.tracking.metric_format import better, human_bytes

# Okabe and Ito's palette, which colour-blind readers can tell apart; the page names a brighter one for dark.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f80")
INK, MUTED, _RULE = "#1b1d22", "#5f6570", "#dfe2e7"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    _RULE: "--rule",
    "#ffffff": "--paper",
    "#dddddd": "--rule",
    **{color: f"--series-{at}" for at, color in enumerate(SERIES)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # the page's own font, and text that can be searched
    "svg.hashsalt": "fedloom",  # the same bytes for the same run
    "text.parse_math": False,  # a client's name may hold dollars
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
STEPS = [1, 2, 2.5, 5, 10]
_PANEL = (4.7, 2.75)
WIDE = 9.6
_MANY = 40
"""Clients up to which each has a line of its own with its name."""


@dataclass(frozen=True)
class Line:
    """One run in a picture."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    """Of SERIES."""
    dashed: bool = False
    level: bool = False
    """Drawn as one level, its last value: a run whose x means nothing beside the others'."""


def svg(draw: Callable[[], Figure], label: str) -> str:
    """Return what `draw` returns as inline SVG; `label` is what a screen reader says."""
    with rc_context(_STYLE), catch_warnings():
        # Names may be of any script: the page's own font draws them.
        filterwarnings("ignore", message="Glyph .* missing from font")
        figure = draw()
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg )', r"\1\2", text, count=1)
    text = re.sub(r"font: ([^;\"]*?)(\d+\.?\d*px) [^;\"]*", r"font: \1\2 var(--font)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def png(draw: Callable[[], Figure]) -> bytes:
    """Return what `draw` returns as a picture of its own, on white."""
    with rc_context({**_STYLE, "savefig.facecolor": "white"}), catch_warnings():
        filterwarnings("ignore", message="Glyph .* missing from font")
        out = BytesIO()
        draw().savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def curve(metric: Metric, lines: Sequence[Line]) -> Figure:
    """Draw a metric over the rounds."""
    figure, axes = panel()
    _draw(axes, lines)
    heading(figure, metric.title)
    rounds_axis(axes)
    quality_axis(axes, metric)
    return figure


def quality_by_time(metric: Metric, lines: Sequence[Line]) -> Figure:
    """Draw a metric over the seconds of an event clock."""
    figure, axes = panel()
    _draw(axes, lines)
    heading(figure, f"{metric.title} by virtual time")
    axes.set_xlabel("virtual seconds, all rounds so far")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    quality_axis(axes, metric)
    return figure


def quality_by_bytes(metric: Metric, lines: Sequence[Line], *, log: bool = False) -> Figure:
    """Draw a metric over the bytes it took."""
    figure, axes = panel()
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    _draw(axes, lines)
    heading(figure, f"{metric.title} by bytes")
    axes.set_xlabel("bytes sent and received, all clients")
    axes.xaxis.set_major_formatter(FuncFormatter(_bytes))
    if not log:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    quality_axis(axes, metric)
    return figure


def round_bytes(upload: Sequence[tuple[int, float]], download: Mapping[int, float]) -> Figure:
    """Draw the bytes of each round, uploads below downloads."""
    figure, axes = panel()
    rounds = [number for number, _ in upload]
    up = [value for _, value in upload]
    down = [download.get(number, 0.0) for number in rounds]
    axes.bar(rounds, up, color=SERIES[0], width=0.8)
    axes.bar(rounds, down, bottom=up, color=SERIES[5], width=0.8)
    heading(figure, "Bytes per round, all clients")
    rounds_axis(axes)
    axes.set_xlim(min(rounds) - 0.7, max(rounds) + 0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(_bytes))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    return figure


def clients(
    metric: Metric,
    before: Mapping[ClientId, float],
    after: Mapping[ClientId, float],
    alone: Mapping[ClientId, float],
    *,
    color: int = 1,
) -> Figure:
    """Draw every client's way from before to after, best or largest on top, and in `color` how it does alone."""
    order = sorted(after, key=lambda client: (after[client], client))
    if metric.better == "lower":
        order.reverse()
    named = len(order) <= _MANY
    height = 0.75 + 0.23 * len(order) if named else 3.2
    figure = Figure(figsize=(WIDE, height))
    left = 0.035 + 0.0085 * max(len(client) for client in order) if named else 0.06
    axes = figure.add_axes((left, 0.5 / height, 0.985 - left, 1 - 0.6 / height))

    def at(values: Mapping[ClientId, float]) -> list[tuple[float, float]]:
        found = [(values[client], float(at)) for at, client in enumerate(order) if client in values]
        return found if named else [(at, value) for value, at in found]

    for spot, client in enumerate(order):
        span, both = (before.get(client, after[client]), after[client]), (spot, spot)
        axes.plot(
            *((span, both) if named else (both, span)), color=_RULE, linewidth=2.4 if named else 1.2
        )
    size = 34 if named else 12
    for values, paint, marker, filled in (
        (before, MUTED, "o", False),
        (alone, SERIES[color], "D", True),
        (after, SERIES[0], "o", True),
    ):
        points = at(values)
        if points:
            xs, ys = zip(*points, strict=True)
            axes.scatter(
                xs,
                ys,
                s=size * (0.7 if marker == "D" else 1),
                marker=marker,
                facecolor=paint if filled else "#ffffff",
                edgecolor=paint,
                linewidth=1.2,
                zorder=3,
            )
    _dress_clients(axes, metric, order, named=named)
    return figure


def _dress_clients(axes: Axes, metric: Metric, order: Sequence[ClientId], *, named: bool) -> None:
    quality = axes.xaxis if named else axes.yaxis
    if metric.is_share:
        quality.set_major_formatter(FuncFormatter(per_cent))
    axes.grid(visible=True, axis="both" if named else "y")
    if named:
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.grid(visible=False, axis="y")
        direction = f" ({better(metric)})" if better(metric) else ""
        axes.set_xlabel(f"{metric.title.lower()}{direction}")
    else:
        axes.set_xlim(-1, len(order))
        way = "lowest to highest" if metric.better == "none" else "worst to best"
        axes.set_xlabel(f"clients, from {way} {metric.title.lower()}")


def widened(figure: Figure) -> Figure:
    """Give a figure made elsewhere the width of the page, and its text the page's sizes."""
    figure.set_size_inches(WIDE, 3.4)
    for text in figure.findobj(Text):
        text.set_fontsize(8)
    return figure


def panel() -> tuple[Figure, Axes]:
    """Return a figure and its axes, below room for a heading."""
    figure = Figure(figsize=_PANEL)
    # The same place in every panel, so that panels side by side line up.
    return figure, figure.add_axes((0.125, 0.165, 0.855, 0.71))


def rounds_axis(axes: Axes) -> None:
    """Make rounds, whole ones, the x of a panel."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def heading(figure: Figure, text: str) -> None:
    """Write what a figure shows above it."""
    figure.text(0.004, 0.945, text, fontsize=9, fontweight="bold")


def _draw(axes: Axes, lines: Sequence[Line]) -> None:
    for line in reversed(lines):
        style = "--" if line.dashed else "-"
        color = SERIES[line.color % len(SERIES)]
        if line.level:
            axes.axhline(line.points[-1][1], color=color, linestyle=style, linewidth=1.4)
            continue
        marker = "" if line.dashed or len(line.points) > 30 else "o"
        axes.plot(
            *zip(*line.points, strict=True), color=color, linestyle=style, marker=marker or None
        )
        if len(line.points) == 1:
            axes.plot(*line.points[0], color=color, marker="o")
    axes.margins(x=0.03, y=0.08)


def quality_axis(axes: Axes, metric: Metric) -> None:
    """Tick an axis of a metric: a share from 0, in per cent."""
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    if metric.is_share:
        top = axes.get_ylim()[1]
        axes.set_ylim(0, axes.yaxis.get_major_locator().tick_values(0, top)[-1])
        axes.yaxis.set_major_formatter(FuncFormatter(per_cent))


def per_cent(value: float, _: int | None = None) -> str:
    """Return a tick label of a share."""
    return f"{100 * value:.4g} %"


def _bytes(value: float, _: int | None = None) -> str:
    number, unit = human_bytes(value).split()
    return f"{float(number):g} {unit}" if value > 0 else "0"
