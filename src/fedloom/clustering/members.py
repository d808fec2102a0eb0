"""Who is in which cluster: rows as they arrive, and groupings that follow one another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedloom.clustering.groups import Groups, find_groups
from fedloom.clustering.pooling import Variances
from fedloom.clustering.tree import Matrix
from fedloom.core.description import GLOBAL, Clusters
from fedloom.core.protocols import ClientId

GLOBAL_MODEL = -1
"""The model of clients without a cluster."""


@dataclass(frozen=True)
class Grouping:
    """What is known of the clients, and where it puts them."""

    rows: Mapping[ClientId, Tensor] = field(default_factory=dict)
    """Directions clients moved in, (size,) float32 of length 1."""
    row_rounds: Mapping[ClientId, int] = field(default_factory=dict)
    """The round of each one's newest row."""
    row_counts: Mapping[ClientId, int] = field(default_factory=dict)
    """How many rows each one sent."""
    assignment: Mapping[ClientId, int] = field(default_factory=dict)
    """Each client's cluster; empty where all are one. A number is used once in a run."""
    clients: Sequence[ClientId] = ()
    """The rows of `groups`."""
    groups: Groups = field(default_factory=lambda: find_groups(torch.zeros(0, 1)))
    """As found last."""
    num_born: int = 0
    """Clusters there ever were."""
    changes: Mapping[int, Mapping[ClientId, int]] = field(default_factory=dict)
    """By round, who came to which cluster; GLOBAL_MODEL for none."""

    @property
    def members(self) -> Mapping[int, Sequence[ClientId]]:
        """Return the clients of each cluster."""
        found: dict[int, list[ClientId]] = {}
        for client, cluster in self.assignment.items():
            found.setdefault(cluster, []).append(client)
        return dict(sorted(found.items()))


def with_rows(grouping: Grouping, rows: Mapping[ClientId, Tensor], round: int) -> Grouping:
    """Return the grouping with new rows, each averaged with the client's last; rows that say nothing are left out."""
    known = dict(grouping.rows)
    row_rounds, row_counts = dict(grouping.row_rounds), dict(grouping.row_counts)
    for client, row in rows.items():
        length = row.norm()
        if not 0 < float(length) < math.inf:
            continue
        unit = row.float() / length
        mean = unit + known[client] if client in known else unit
        known[client] = mean / mean.norm().clamp_min(1e-12)
        row_rounds[client] = round
        row_counts[client] = row_counts.get(client, 0) + 1
    return replace(grouping, rows=known, row_rounds=row_rounds, row_counts=row_counts)


def regrouped(
    grouping: Grouping, round: int, *, num_clusters: int | None = None, hysteresis: float = 0.0
) -> tuple[Grouping, Mapping[int, int]]:
    """Group the clients anew; return it, and the cluster (or GLOBAL_MODEL) that each one begins from: its nearest so far."""
    clients = sorted(grouping.rows)
    rows = torch.stack([grouping.rows[client] for client in clients])
    before = [grouping.assignment.get(client) for client in clients]
    found = find_groups(rows, num_clusters, current=before, hysteresis=hysteresis)
    return renamed(replace(grouping, clients=tuple(clients), groups=found), round)


def renamed(
    grouping: Grouping, round: int, *, single: bool = False
) -> tuple[Grouping, Mapping[int, int]]:
    """Give the groups the numbers of the clusters they follow; return also where each begins.

    One group is no cluster unless `single` says so.
    """
    labels, old = grouping.groups.labels, grouping.assignment
    count = max(labels, default=0) + 1
    if count == 1 and not single:
        return _moved(grouping, {}, round), {}
    known = sorted({GLOBAL_MODEL, *old.values()})
    overlap = np.zeros((count, len(known)))
    for client, label in zip(grouping.clients, labels, strict=True):
        overlap[label, known.index(old.get(client, GLOBAL_MODEL))] += 1
    numbers = _matched(overlap[:, 1:], known[1:])
    num_born, origins = grouping.num_born, {}
    for label in range(count):
        if label not in numbers:
            numbers[label], num_born = num_born, num_born + 1
            origins[numbers[label]] = known[int(overlap[label].argmax())]
        else:
            origins[numbers[label]] = numbers[label]
    assignment = {c: numbers[label] for c, label in zip(grouping.clients, labels, strict=True)}
    return _moved(replace(grouping, num_born=num_born), assignment, round), origins


def _matched(overlap: Matrix, known: Sequence[int]) -> dict[int, int]:
    """Return the old number of each group that follows a cluster: as many clients as possible keep theirs."""
    from scipy.optimize import linear_sum_assignment

    pairs = zip(*linear_sum_assignment(-overlap), strict=True)
    return {int(group): known[at] for group, at in pairs if overlap[group, at]}


def _moved(grouping: Grouping, assignment: Mapping[ClientId, int], round: int) -> Grouping:
    old = grouping.assignment
    moves = {
        client: assignment.get(client, GLOBAL_MODEL)
        for client in sorted({*old, *assignment})
        if old.get(client) != assignment.get(client)
    }
    changes = {**grouping.changes, round: moves} if moves else grouping.changes
    return replace(grouping, assignment=dict(sorted(assignment.items())), changes=changes)


def clusters_of(grouping: Grouping, variances: Variances | None = None) -> Clusters:
    """Return the description of a grouping, its clusters by name, and what pooled ones differ by."""
    groups, known = grouping.groups, variances or Variances()
    tau2 = known.tau2()
    return Clusters(
        {client: cluster_name(k) for client, k in grouping.assignment.items()},
        {
            round: {client: cluster_name(k) for client, k in moves.items()}
            for round, moves in grouping.changes.items()
        },
        confidence=groups.confidence,
        noise=groups.noise,
        clients=grouping.clients,
        similarity=groups.similarity,
        merges=groups.merges,
        variances={name: (noise, tau2.get(name, 0.0)) for name, noise in known.noise.items()},
    )


def cluster_name(number: int) -> str:
    """Return what a cluster's model is called; GLOBAL is the one of clients without a cluster."""
    return GLOBAL if number == GLOBAL_MODEL else f"cluster-{number}"
