"""Settings that clients tried in turns, as pictures: how likely each was over the rounds (FedEx)."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedloom.report import figures
from fedloom.report.run_folder import Results

_CHANCE = re.compile(r"server/(?:(.+)/)?arm_(\d+)")


def arms_section(own: Results) -> dict[str, Any] | None:
    """Return what the section `arms` of the page shows; None for a run that tries nothing."""
    chances: dict[str, dict[int, Sequence[tuple[float, float]]]] = {}
    for name in own.metrics():
        if found := _CHANCE.fullmatch(name):
            chances.setdefault(found[1] or "", {})[int(found[2])] = own.history.of(name)
    chances = {tier: arms for tier, arms in chances.items() if any(arms.values())}
    if not chances:
        return None
    told, count = _settings(own), max(max(arms) for arms in chances.values())
    legend = [
        {
            "label": told.get(k, f"arm {k}"),
            "color": (k - 1) % len(figures.SERIES),
            "dashed": k > len(figures.SERIES),
        }
        for k in range(1, count + 1)
    ]
    return {"legend": legend, "panels": [_panel(own, t, a) for t, a in sorted(chances.items())]}


def _panel(
    own: Results, tier: str, arms: Mapping[int, Sequence[tuple[float, float]]]
) -> dict[str, str]:
    title = f"Chance of each arm, tier {tier}" if tier else "Chance of each arm"
    drawn = figures.svg(partial(_curves, title, arms), f"{title}, over the rounds")
    entropy = own.history.of(f"server/{tier}/arm_entropy" if tier else "server/arm_entropy")
    said = f"Entropy {entropy[0][1]:.2f} nats in round {entropy[0][0]:.0f}, {entropy[-1][1]:.2f} in round {entropy[-1][0]:.0f}."
    return {"figure": drawn, "said": said}


def _curves(title: str, arms: Mapping[int, Sequence[tuple[float, float]]]) -> Figure:
    figure, axes = figures.panel()
    for k, points in sorted(arms.items()):
        color = figures.SERIES[(k - 1) % len(figures.SERIES)]
        style = "--" if k > len(figures.SERIES) else "-"
        axes.plot(*zip(*points, strict=True), color=color, linestyle=style)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(figures.per_cent))
    figures.heading(figure, title)
    figures.rounds_axis(axes)
    return figure


def _settings(own: Results) -> Mapping[int, str]:
    """Return every arm in words, by its number, as the recipe has them."""
    layers = own.recipe.get("algorithm") or []
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, Mapping) and isinstance(layer.get("fedex"), Mapping):
            return {k: _words(arm) for k, arm in enumerate(layer["fedex"].get("arms") or (), 1)}
    return {}


def _words(arm: Mapping[str, Any]) -> str:
    parts = [f"lr x{arm.get('lr', 1.0):g}"]
    if arm.get("weight_decay", 1.0) != 1.0:
        parts.append(f"weight decay x{arm['weight_decay']:g}")
    if arm.get("steps") is not None:
        parts.append(f"{arm['steps']} steps")
    return ", ".join(parts)
