"""What each client is a mixture of, as a picture: the shares of the models that answer together."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count, takewhile

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedloom.core.protocols import ClientId
from fedloom.report import figures
from fedloom.report.run_folder import Results

_NAMED = 40
"""Clients up to which each bar has its name."""


def mixture_section(own: Results) -> dict[str, object] | None:
    """Return what the section `mixture` of the page shows; None for a run whose clients use one model."""
    by_component = (own.by_client(f"test/mixture_{at}")[1] for at in count(1))
    shares = list(takewhile(bool, by_component))
    if not shares:
        return None
    drawn = figures.svg(partial(_bars, shares), "Share of each component, by client")
    legend = [
        {"label": f"component {at + 1}", "color": at % len(figures.SERIES), "dashed": False}
        for at in range(len(shares))
    ]
    return {"figure": drawn, "legend": legend}


def _bars(shares: Sequence[Mapping[ClientId, float]]) -> Figure:
    clients = sorted(shares[0])
    figure, axes = figures.panel()
    below = [0.0] * len(clients)
    for at, component in enumerate(shares):
        values = [component[client] for client in clients]
        color = figures.SERIES[at % len(figures.SERIES)]
        axes.bar(range(len(clients)), values, bottom=below, color=color, width=0.8)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(figures.per_cent))
    if len(clients) <= _NAMED:
        axes.set_xticks(range(len(clients)), clients, rotation=90)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(clients)} clients")
    figures.heading(figure, "Share of each component, by client")
    return figure
