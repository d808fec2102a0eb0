"""Clients that come in groups, each with labels of its own: languages, domains.

FedMLLM, Leveraging Federated Learning for Multilingual and Private Language Models via Model Clustering: its strategies
`language_clusters` and `language_multi_domain`, for any label, any number of clients and any share of other labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.core.protocols import ClientId
from fedloom.core.randomness import derive
from fedloom.data.names import client_names
from fedloom.data.sharding import (
    Assignment,
    Labels,
    apportion,
    at_most,
    by_value,
    sharded,
    shuffled,
)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Give every group of clients one value of a label, and deal it out in equal parts among them."""

    by: str
    """The label: `language`, `domain`, ..."""
    share: float = 1.0
    """Of a client's examples, those of its group's own value alone; the others are a sample of everybody's. 0 is iid."""

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        _check_share(self.share)

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        return _Deal(by_value(labels, self.by), 1, self.share).assign(num_clients, seed)

    def groups(self, labels: Sequence[Labels], num_clients: int | None) -> Mapping[ClientId, str]:
        """Return the group of each client, named for its values."""
        return _Deal(by_value(labels, self.by), 1, self.share).groups(num_clients)


@dataclass(frozen=True, slots=True)
class MultiDomain:
    """Give every group of clients a part of several values of a label, its own and the next ones."""

    by: str
    """The label: `language`, `domain`, ..."""
    num_values: int = 2
    """How many values a group has: one part of each, so that as many groups share a value."""
    share: float = 1.0
    """Of a client's examples, those of its group's own values alone; the others are a sample of everybody's. 0 is iid."""
    order: Sequence[str] = ()
    """The values in the order in which they are next to each other, the first after the last; empty is alphabetical."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sharded."""
        _check_share(self.share)
        if self.num_values < 2:
            raise ValueError(
                f"data.partition.num_values must be at least 2, got {self.num_values}; one value a group is clusters"
            )

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        return _Deal(self._ordered(labels), self.num_values, self.share).assign(num_clients, seed)

    def groups(self, labels: Sequence[Labels], num_clients: int | None) -> Mapping[ClientId, str]:
        """Return the group of each client, named for its values."""
        return _Deal(self._ordered(labels), self.num_values, self.share).groups(num_clients)

    def _ordered(self, labels: Sequence[Labels]) -> dict[str, list[int]]:
        values = by_value(labels, self.by)
        if self.num_values > len(values):
            raise ValueError(
                f"data.partition.num_values is {self.num_values}, but the label {self.by!r} has only {len(values)} values"
            )
        if not self.order:
            return values
        if sorted(self.order) != list(values):
            raise ValueError(
                f"data.partition.order must name each value of {self.by!r} once ({', '.join(values)}), "
                f"got {', '.join(self.order)}"
            )
        return {value: values[value] for value in self.order}


@dataclass(frozen=True, slots=True)
class _Deal:
    """Values of a label and how they are sharded: the part j of value v goes to the group v - j, around the circle."""

    values: Mapping[str, list[int]]
    parts: int
    share: float

    def assign(self, num_clients: int | None, seed: int) -> Assignment:
        count = at_most(num_clients, sum(map(len, self.values.values())))
        members = self._members(count)
        total = self._mass(members, count)
        clients: Assignment = {name: [] for name in client_names(count)}
        for at, (value, indices) in enumerate(self.values.items()):
            order = shuffled(indices, derive(seed, "members", value))
            own, mixed = apportion(len(order), [self.share, 1 - self.share])
            starts = _cut(order[:own], self.parts)
            for part, some in enumerate(starts):
                mine = members[self._group(at - part, count)]
                weights = [float(i in mine) for i in range(count)]
                _give(clients, some, apportion(len(some), weights))
            _give(clients, order[own : own + mixed], apportion(mixed, total))
        return {name: sorted(indices) for name, indices in clients.items()}

    def groups(self, num_clients: int | None) -> dict[ClientId, str]:
        count = at_most(num_clients, sum(map(len, self.values.values())))
        own: dict[int, dict[str, None]] = {}
        for at, value in enumerate(self.values):
            for part in range(self.parts):
                own.setdefault(self._group(at - part, count), {})[value] = None
        names = client_names(count)
        return {
            names[i]: "+".join(sorted(own[group]))
            for group, members in enumerate(self._members(count))
            for i in members
        }

    def _group(self, value: int, count: int) -> int:
        """Return the group of a value; with fewer clients than values, neighbours share one."""
        kinds = len(self.values)
        return (value % kinds) * min(kinds, count) // kinds

    def _members(self, count: int) -> list[range]:
        """Return the clients of each group: equally many, the first groups one more where that does not come out."""
        sizes = apportion(count, [1.0] * min(len(self.values), count))
        starts = [sum(sizes[:group]) for group in range(len(sizes))]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def _mass(self, members: Sequence[range], count: int) -> list[float]:
        """Return how many examples each client would have of its own values: what the sample of all is in proportion to."""
        mass = [0.0] * count
        for at, indices in enumerate(self.values.values()):
            for part in range(self.parts):
                mine = members[self._group(at - part, count)]
                for i in mine:
                    mass[i] += len(indices) / self.parts / len(mine)
        return mass


def _cut(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    sizes = apportion(len(items), [1.0] * parts)
    return [items[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(parts)]


def _give(clients: Assignment, items: Sequence[int], sizes: Sequence[int]) -> None:
    for name, indices in sharded(items, sizes).items():
        clients[name] += indices


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"data.partition.share must be in [0, 1], got {share}")
