"""The clusters a run ended with, in full: who is where, what that rests on, and which labels it agrees with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedloom.clustering.groups import adjusted_rand
from fedloom.core.description import Clusters
from fedloom.core.protocols import ClientId, Profile

_MOST = 300
"""Clients whose similarities are written down, all with all."""


def clusters_record(clusters: Clusters, profiles: Mapping[ClientId, Profile]) -> dict[str, Any]:
    """Return what clusters.json holds: who is where and since when, and what that rests on."""
    return {
        "assignment": dict(clusters.assignment),
        "changes": {str(round): dict(moves) for round, moves in clusters.changes.items()},
        "confidence": clusters.confidence,
        "noise": clusters.noise,
        "agreement": _agreement(clusters, profiles),
        "clients": list(clusters.clients),
        "similarity": _rounded(clusters.similarity, 4) if len(clusters.clients) <= _MOST else [],
        "merges": _rounded(clusters.merges, 6),
    }


def _agreement(
    clusters: Clusters, profiles: Mapping[ClientId, Profile]
) -> dict[str, dict[str, Any]]:
    """Return, for each label that all grouped clients have, its adjusted Rand index with the clusters."""
    clients = [client for client in clusters.assignment if client in profiles]
    if not clients:
        return {}
    found = [clusters.assignment[client] for client in clients]
    shared = set.intersection(*(set(profiles[client]) for client in clients))
    agreement, seen = dict[str, dict[str, Any]](), list[list[str]]()
    for label in sorted(shared, key=lambda name: (name == "group", name)):
        values = [profiles[client][label] for client in clients]
        # A group is called for the label it was dealt out by: that name is enough.
        if 1 < len(set(values)) < len(values) and values not in seen:
            seen.append(values)
            agreement[label] = {
                "adjusted_rand": adjusted_rand(found, values),
                "num_values": len(set(values)),
            }
    return agreement


def _rounded(values: Tensor | None, digits: int) -> list[list[float]]:
    return (
        []
        if values is None
        else [[round(value, digits) for value in row] for row in values.tolist()]
    )
