"""How evenly a model serves clients: spread, deciles and Jain's index of their own values of a metric.

The figures of FederatedScope's fairness report. Jain's index (Jain, Chiu, Hawe 1984, DEC-TR-301) is 1 where all clients
have the same, and 1/n where one of n has everything; of a loss, which is the better the lower, it says as well how alike
clients are.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from fedloom.core.metrics import Metric


def fairness(metric: Metric, values: Sequence[float]) -> Mapping[str, float]:
    """Return the figures of clients' own values, all finite, every client alike whatever its number of examples.

    Args:
        metric: Which way is better.
        values: One a client, at least one.

    Returns:
        `clients`, `mean`, `std` (of these clients, not of more like them), `worst_decile` and `best_decile` (means of the
        tenth of the clients with the worst and best values, rounded up), and `jain` where no value is below 0.
    """
    ordered = sorted(values, key=metric.cost)
    tenth = math.ceil(len(ordered) / 10)
    found = {
        "clients": float(len(ordered)),
        "mean": statistics.fmean(ordered),
        "std": statistics.pstdev(ordered),
        "worst_decile": statistics.fmean(ordered[-tenth:]),
        "best_decile": statistics.fmean(ordered[:tenth]),
    }
    squares = math.fsum(value * value for value in ordered)
    if squares and min(ordered) >= 0:
        found["jain"] = math.fsum(ordered) ** 2 / (len(ordered) * squares)
    return found
