"""Clusters as pictures: who resembles whom, where the tree is cut, and who was where over the rounds."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedloom.report import figures
from fedloom.report.pooling import pooled_panels, pooled_sentences
from fedloom.report.run_folder import Results
from fedloom.tracking.metric_format import MINUS

_NAMED = 40
"""Clients up to which each is named beside its row."""
_SQUARE = (4.7, 4.3)
_ROW = 0.2
_ALONE = -1
"""The colour of clients without a cluster."""

Tree = Sequence[Sequence[float]]
Owner = TypeVar("Owner")


def clusters_section(own: Results) -> dict[str, Any] | None:
    """Return what the section `clusters` of the page shows; None for a run that does not group its clients."""
    record = own.clusters
    if not record.get("changes"):
        return None
    colors = _colors(record)
    members: dict[str, list[str]] = {}
    for client, cluster in record["assignment"].items():
        members.setdefault(cluster, []).append(client)
    order = _order(record)
    panels = []
    if record["similarity"]:
        draw = partial(_similarity, record, order, colors)
        panels.append(figures.svg(draw, "Similarity of the clients' updates"))
    if record["merges"]:
        panels.append(
            figures.svg(partial(_tree, record, colors), "Tree of the clients, and its cut")
        )
    panels += pooled_panels(own, colors)
    last = max((int(line["round"]) for line in own.history.lines), default=1)
    drawn = partial(_course, record, order, colors, last)
    return {
        "said": [*_sentences(record, len(members)), *pooled_sentences(own)],
        "legend": [
            {"label": f"{cluster} ({len(members[cluster])})", "color": colors[cluster] % 7}
            for cluster in sorted(members, key=lambda name: colors[name])
        ],
        "panels": panels,
        "course": figures.svg(drawn, "Cluster of every client over the rounds"),
    }


def _sentences(record: Mapping[str, Any], count: int) -> list[str]:
    lines = ["At the end there is one model for all." if not count else f"{count} clusters."]
    if record["similarity"] and count:
        share = figures.per_cent(round(record["confidence"], 3))
        lines[0] += (
            f" Confidence {share}: so many clients stay with their cluster when entries are drawn again."
        )
    for label, agreement in record["agreement"].items():
        lines.append(
            f"Against the {agreement['num_values']} values of {label}, the adjusted Rand index is "
            f"{agreement['adjusted_rand']:.3f}."
        )
    return lines


def _colors(record: Mapping[str, Any]) -> dict[str, int]:
    """Return a number for every cluster there ever was: the ones there are first, by size of number."""
    ever = [cluster for moves in record["changes"].values() for cluster in moves.values()]
    now = sorted(set(record["assignment"].values()), key=_number)
    past = sorted(set(ever) - set(now) - {"global"}, key=_number)
    return {**{cluster: at for at, cluster in enumerate([*now, *past])}, "global": _ALONE}


def _number(cluster: str) -> tuple[int, str]:
    """Return what clusters are ordered by: ours by number, after names that have none."""
    number = cluster.rpartition("-")[2]
    return (int(number), cluster) if number.isdecimal() else (-1, cluster)


def _order(record: Mapping[str, Any]) -> list[str]:
    """Return the clients by cluster and, inside one, as the tree has them side by side."""
    leaves = _leaves(record["merges"], len(record["clients"]))
    spots = {record["clients"][leaf]: spot for spot, leaf in enumerate(leaves)}
    clients = sorted({*record["clients"], *record["assignment"]})
    ordered = sorted({*record["assignment"].values()}, key=_number)
    numbers = {c: ordered.index(cluster) for c, cluster in record["assignment"].items()}

    def key(client: str) -> tuple[int, int]:
        return numbers.get(client, len(ordered)), spots.get(client, len(spots))

    return sorted(clients, key=key)


def _leaves(merges: Tree, count: int) -> list[int]:
    """Return the leaves of a tree as scipy writes it, from left to right; without a tree, as they are."""
    if not merges:
        return list(range(count))
    leaves, stack = list[int](), [2 * count - 2]
    while stack:
        node = stack.pop()
        if node < count:
            leaves.append(node)
        else:
            left, right = (int(kid) for kid in merges[node - count][:2])
            stack += [right, left]
    return leaves


def _paint(number: int) -> str:
    return figures.MUTED if number == _ALONE else figures.SERIES[number % len(figures.SERIES)]


def _similarity(
    record: Mapping[str, Any], order: Sequence[str], colors: Mapping[str, int]
) -> Figure:
    figure = Figure(figsize=_SQUARE)
    axes = figure.add_axes((0.19, 0.02, 0.8, 0.885))
    known = {client: at for at, client in enumerate(record["clients"])}
    shown = [client for client in order if client in known]
    at = [known[client] for client in shown]
    cosines = np.array(record["similarity"])[np.ix_(at, at)]
    apart = cosines[~np.eye(len(at), dtype=bool)]
    low, high = (float(apart.min()), float(apart.max())) if apart.size else (0.0, 1.0)
    shade = np.clip((cosines - low) / (high - low or 1), 0, 1)
    # Opacity of one colour, so that the picture lies on light and dark pages alike.
    image = np.concatenate(
        [np.broadcast_to(to_rgb(figures.SERIES[0]), (*shade.shape, 3)), shade[..., None]], axis=-1
    )
    axes.imshow(image, interpolation="none")
    axes.grid(visible=False)
    axes.set_xticks([])
    owners = [colors[record["assignment"].get(client, "global")] for client in shown]
    _rows(axes, shown, record)
    for start, stop, number in _runs(owners):
        side = stop - start
        corner = (start - 0.5, start - 0.5)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=_paint(number), lw=1.6))
    ends = f"from {low:.2f} to {high:.2f}".replace("-", MINUS)
    title = f"Similarity of the clients' updates, {ends}"
    figures.heading(figure, title)
    return figure


def _rows(axes: Axes, clients: Sequence[str], record: Mapping[str, Any]) -> None:
    """Name each row, or of very many each cluster's."""
    size = 7 if len(clients) <= 24 else 5
    if len(clients) <= _NAMED:
        axes.set_yticks(range(len(clients)), clients, fontsize=size)
        return
    runs = _runs([record["assignment"].get(client, "") for client in clients])
    centres = [(start + stop - 1) / 2 for start, stop, _ in runs]
    axes.set_yticks(centres, [cluster for *_, cluster in runs], fontsize=7)


def _runs(values: Sequence[Owner]) -> list[tuple[int, int, Owner]]:
    """Return (start, stop, value) of every stretch of equal values."""
    runs: list[tuple[int, int, Owner]] = []
    for at, value in enumerate(values):
        if runs and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], at + 1, value)
        else:
            runs.append((at, at + 1, value))
    return runs


def _tree(record: Mapping[str, Any], colors: Mapping[str, int]) -> Figure:
    """Draw average linkage upwards; branches inside a cluster have its colour, those above the cut none."""
    figure = Figure(figsize=_SQUARE)
    axes = figure.add_axes((0.11, 0.16, 0.87, 0.745))
    clients, merges = record["clients"], record["merges"]
    count = len(clients)
    leaves = _leaves(merges, count)
    x = {leaf: float(spot) for spot, leaf in enumerate(leaves)}
    height = dict.fromkeys(range(count), 0.0)
    owner: dict[int, int | None] = {
        at: colors[record["assignment"].get(client, "global")] for at, client in enumerate(clients)
    }
    lines, paints, inside, across = [], [], list[float](), list[float]()
    for at, (left, right, top, _) in enumerate(merges):
        node, kids = count + at, (int(left), int(right))
        x[node], height[node] = (x[kids[0]] + x[kids[1]]) / 2, top
        owner[node] = owner[kids[0]] if owner[kids[0]] == owner[kids[1]] else None
        (across if owner[node] is None else inside).append(top)
        for kid in kids:
            lines += [[(x[kid], height[kid]), (x[kid], top)], [(x[kid], top), (x[node], top)]]
            mine = owner[kid]
            paints += [
                figures.MUTED if mine is None else _paint(mine),
                figures.MUTED if owner[node] is None else _paint(owner[node] or 0),
            ]
    axes.add_collection(LineCollection(lines, colors=paints, linewidths=1.3))
    _dress_tree(axes, [clients[leaf] for leaf in leaves], max(height.values()))
    if across and inside and max(inside) < min(across):
        cut = (max(inside) + min(across)) / 2
        axes.axhline(cut, color=figures.INK, linewidth=1.0, linestyle="--")
        axes.text(count - 0.5, cut, "cut ", ha="right", va="bottom", fontsize=7)
    figures.heading(figure, "Tree of the clients, by 1 \u2212 similarity")
    return figure


def _dress_tree(axes: Axes, names: Sequence[str], top: float) -> None:
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_ylim(0, 1.05 * top or 1)
    axes.grid(visible=False)
    if len(names) <= _NAMED:
        size = 7 if len(names) <= 24 else 5
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(names)} clients")


def _course(
    record: Mapping[str, Any], order: Sequence[str], colors: Mapping[str, int], last: int
) -> Figure:
    """Draw a row a client, from left to right the rounds, in the colour of its cluster after each."""
    named = len(order) <= _NAMED
    row = _ROW if named else 4.2 / len(order)
    height = 0.8 + row * len(order)
    figure = Figure(figsize=(figures.WIDE, height))
    left = 0.03 + 0.0085 * max(map(len, order)) if named else 0.1
    axes = figure.add_axes((left, 0.42 / height, 0.985 - left, 1 - 0.8 / height))
    for spot, client in enumerate(order):
        moves = [
            (int(number), colors[moved[client]])
            for number, moved in record["changes"].items()
            if client in moved
        ]
        ends = [number for number, _ in moves[1:]] + [last + 1]
        for (start, number), end in zip(moves, ends, strict=False):
            if number != _ALONE:
                corner = (start - 0.5, spot - 0.42)
                axes.add_patch(Rectangle(corner, end - start, 0.84, facecolor=_paint(number)))
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0.5, last + 0.5)
    axes.grid(visible=False)
    _rows(axes, order, record)
    figures.rounds_axis(axes)
    title = "Cluster after each round; none where all share one model"
    figure.text(0.004, 1 - 0.24 / height, title, fontsize=9, fontweight="bold")
    return figure
