"""What part each client had in a round's update, where the way of combining them tells: a file beside the metrics."""

from collections.abc import Mapping

from fedloom.core.protocols import ClientId, Metrics
from fedloom.server.combine.robust import INFLUENCE

FILE = "influence.jsonl"
"""A line a round: client -> influence, 1 as it weighs in a mean."""
REJECTED, WHOLE = 0.1, 0.99
"""Below the one a client counts as rejected, below the other as clipped."""
_TOLD = f"server/{INFLUENCE}"


def split_influence(metrics: Metrics) -> tuple[Metrics, Mapping[ClientId, float]]:
    """Return the metrics with numbers in the place of names, and every client's influence; none where nobody's was told."""
    parts = {n.removeprefix(_TOLD): v for n, v in metrics.items() if n.startswith(_TOLD)}
    if not parts:
        return metrics, {}
    counts = {
        "server/num_rejected": float(sum(part < REJECTED for part in parts.values())),
        "server/num_clipped": float(sum(REJECTED <= part < WHOLE for part in parts.values())),
    }
    return {**{n: v for n, v in metrics.items() if not n.startswith(_TOLD)}, **counts}, parts
