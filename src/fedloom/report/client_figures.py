"""The sections of the page that say how evenly clients are served, and what each of them spent."""

from fedloom.report.run_folder import Results
from fedloom.rounds.costs import totals
from fedloom.tracking.metric_format import duration, human_bytes, shown

_FIGURES = ("mean", "std", "worst_decile", "best_decile")
_MOST = 60
"""Clients whose costs are written out; of more those that took longest."""


def fairness_rows(own: Results) -> list[list[str]]:
    """Return a row a metric: its title, mean and spread over clients, deciles, and Jain's index."""
    rows = []
    for name, found in own.summary.get("fairness", {}).items():
        if found["clients"] < 2:
            continue
        metric, jain = own.metric(name), found.get("jain")
        cells = [shown(metric, found[figure]) for figure in _FIGURES]
        last = "\u2013" if jain is None else f"{jain:.3f}"
        rows.append([metric.title, f"{found['clients']:.0f}", *cells, last])
    return rows


def cost_rows(own: Results) -> list[list[str]]:
    """Return a row a client, those that took longest first: rounds, seconds, bytes both ways, operations."""
    found = totals(own.costs)
    longest = sorted(found, key=lambda client: (-found[client]["seconds"], client))[:_MOST]
    return [
        [
            client,
            f"{found[client]['rounds']:.0f}",
            duration(found[client]["seconds"]),
            human_bytes(found[client]["upload_bytes"]),
            human_bytes(found[client]["download_bytes"]),
            flops_in_words(found[client]["flops"]),
        ]
        for client in longest
    ]


def flops_in_words(count: float) -> str:
    """Return a number of operations in units of a thousand, three digits: 1.23e12 -> 1.23 TFLOP."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000 or unit == "P":
            break
        count /= 1000
    return f"{count:.3g} {unit}FLOP"
