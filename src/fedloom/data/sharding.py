"""Examples dealt out to clients: counts, orders and groups that every kind of partition is made of."""

import math
from collections.abc import Mapping, Sequence

from fedloom.core.protocols import ClientId
from fedloom.core.randomness import derive
from fedloom.data.names import client_names

Labels = Mapping[str, str]
Assignment = dict[ClientId, list[int]]

DEFAULT_CLIENTS = 10
UNKNOWN = "unknown"
"""The value of a label that a row lacks."""


def at_most(num_clients: int | None, num_examples: int, each: int = 1) -> int:
    """Return how many clients there are, refusing more than there are examples for."""
    count = DEFAULT_CLIENTS if num_clients is None else num_clients
    if count * each > num_examples:
        raise ValueError(
            f"data.num_clients is {count} with at least {each} examples each, but there are only {num_examples} "
            "examples: lower it, or give more data"
        )
    return count


def by_value(labels: Sequence[Labels], by: str) -> dict[str, list[int]]:
    """Return the examples of each value of a label, sorted by value."""
    groups: dict[str, list[int]] = {}
    for index, of_example in enumerate(labels):
        if by not in of_example:
            known = ", ".join(sorted(of_example)) or "none"
            raise ValueError(
                f"data.partition.by must be a label of the data ({known}), got {by!r}; "
                "data.labels names the columns kept"
            )
        groups.setdefault(of_example[by], []).append(index)
    return dict(sorted(groups.items()))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Return whole numbers that sum to `total`, nearest to the weights' shares (largest remainders)."""
    whole = math.fsum(weights)
    exact = [total * weight / whole for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def shuffled(items: Sequence[int], seed: int) -> list[int]:
    """Return the items in an order that is the same on every machine: sorted by the hash of each."""
    return sorted(items, key=lambda item: derive(seed, "order", item))


def sharded(items: Sequence[int], sizes: Sequence[int]) -> Assignment:
    """Return one stretch of the items after another, sorted, by client."""
    names = client_names(len(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        name: sorted(items[start : start + size])
        for name, start, size in zip(names, starts, sizes, strict=True)
    }
