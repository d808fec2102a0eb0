"""What a run tells of the clusters its server found, and whom each of them serves."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedloom.clustering.groups import adjusted_rand
from fedloom.clustering.members import WHOLE, Grouping
from fedloom.core.protocols import ClientId, Profile
from fedloom.run.parts import parts_of

_MOST = 300
"""Clients whose similarities are written down, all with all."""


def grouping_of(state: Any) -> Grouping | None:
    """Return the grouping that a server's state holds, however deep; None where clients are not grouped."""
    return next((part for part in parts_of(state) if isinstance(part, Grouping)), None)


def cluster_name(number: int) -> str:
    """Return what a cluster's model is called; `global` is the one of clients without a cluster."""
    return "global" if number == WHOLE else f"cluster-{number}"


def describe_clusters(grouping: Grouping, profiles: Mapping[ClientId, Profile]) -> dict[str, Any]:
    """Return what clusters.json holds: who is where and since when, and what that rests on."""
    groups = grouping.groups
    return {
        "assignment": {c: cluster_name(k) for c, k in grouping.assignment.items()},
        "changes": {
            str(round): {client: cluster_name(k) for client, k in moves.items()}
            for round, moves in grouping.changes.items()
        },
        "confidence": groups.confidence,
        "noise": groups.noise,
        "agreement": _agreement(grouping, profiles),
        "clients": list(grouping.clients),
        "similarity": _rounded(groups.similarity, 4) if len(grouping.clients) <= _MOST else [],
        "merges": _rounded(groups.merges, 6),
    }


def _agreement(
    grouping: Grouping, profiles: Mapping[ClientId, Profile]
) -> dict[str, dict[str, Any]]:
    """Return, for each label that all grouped clients have, its adjusted Rand index with the clusters."""
    clients = [client for client in grouping.assignment if client in profiles]
    if not clients:
        return {}
    found = [grouping.assignment[client] for client in clients]
    shared = set.intersection(*(set(profiles[client]) for client in clients))
    told, seen = dict[str, dict[str, Any]](), list[list[str]]()
    for label in sorted(shared, key=lambda name: (name == "group", name)):
        values = [profiles[client][label] for client in clients]
        # A group is called for the label it was dealt out by: that name is enough.
        if 1 < len(set(values)) < len(values) and values not in seen:
            seen.append(values)
            told[label] = {
                "adjusted_rand": adjusted_rand(found, values),
                "num_values": len(set(values)),
            }
    return told


def _rounded(values: Tensor, digits: int) -> list[list[float]]:
    return [[round(value, digits) for value in row] for row in values.tolist()]
