"""Which client holds which example: iid, skewed by label or by size, in groups, or as the data came.

Every kind assigns whole examples to clients; `splits.py` then cuts each client's own, so that its training,
validation and test examples come from one distribution.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.core.randomness import derive
from fedloom.data.mixtures import Clusters, MultiDomain
from fedloom.data.names import client_names, safe_names
from fedloom.data.sharding import (
    Assignment,
    Labels,
    apportion,
    at_most,
    by_value,
    sharded,
    shuffled,
)

DRAWS = 200
"""Dirichlet draws tried before a client below `min_examples` is an error."""


@dataclass(frozen=True, slots=True)
class Iid:
    """Deal shuffled examples out in equal parts."""

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        count = at_most(num_clients, len(labels))
        return sharded(shuffled(range(len(labels)), seed), apportion(len(labels), [1.0] * count))


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Draw, for every label, the clients' shares of it from Dirichlet(alpha).

    Hsu et al., Measuring the Effects of Non-Identical Data Distribution, arXiv 1909.06335; per label as in Li et
    al., arXiv 2102.02079.
    """

    by: str
    """The label: `language`, `task`, `category`, ..."""
    alpha: float = 0.5
    """Above 0; small is one label a client, large is iid."""
    min_examples: int = 3
    """Draw again until every client has as many; at 0 the first draw stands, and `data.min_examples` decides who takes
    part."""
    balanced: bool = False
    """Deal one label after another, and no more to a client that has its equal share: as the code of Li et al."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        _check_alpha(self.alpha)
        _check_min_examples(self.min_examples)

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        groups = by_value(labels, self.by)
        count = at_most(num_clients, len(labels), self.min_examples)
        most: list[int] = []
        for draw in range(DRAWS):
            rng = random.Random(derive(seed, "dirichlet", draw))
            shares = self._shares(rng, groups, count)
            sizes = [sum(share[i] for share in shares.values()) for i in range(count)]
            most = max(most, sizes, key=lambda sizes: min(sizes, default=-1))
            if min(sizes) >= self.min_examples:
                break
        else:
            raise ValueError(
                f"data.partition leaves {client_names(count)[most.index(min(most))]} with {min(most)} of at least "
                f"{self.min_examples} examples in the best of {DRAWS} draws: raise data.partition.alpha "
                f"({self.alpha:g}) or data.num_examples, or lower data.num_clients ({count}) or "
                "data.partition.min_examples"
            )
        clients: Assignment = {name: [] for name in client_names(count)}
        for value, members in groups.items():
            some = sharded(shuffled(members, derive(seed, "members", value)), shares[value])
            for name, indices in some.items():
                clients[name] += indices
        return {name: sorted(indices) for name, indices in clients.items()}

    def _shares(
        self, rng: random.Random, groups: Mapping[str, list[int]], count: int
    ) -> dict[str, list[int]]:
        """Return how many examples of every label each client gets."""
        equal = sum(map(len, groups.values())) / count
        held = [0] * count
        shares = {}
        for value, members in groups.items():
            takes = [not self.balanced or has < equal for has in held]
            shares[value] = apportion(len(members), _dirichlet(rng, self.alpha, takes))
            held = [has + new for has, new in zip(held, shares[value], strict=True)]
        return shares


@dataclass(frozen=True, slots=True)
class Shards:
    """Sort by label, cut into equal shards, deal each client a few.

    McMahan et al., Communication-Efficient Learning of Deep Networks, arXiv 1602.05629, section 3.
    """

    by: str
    """The label: `language`, `task`, `category`, ..."""
    per_client: int = 2
    """Shards of a client, which sees about as many labels."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sharded."""
        if self.per_client < 1:
            raise ValueError(f"data.partition.per_client must be at least 1, got {self.per_client}")

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        count = at_most(num_clients, len(labels), self.per_client)
        ordered = [
            index
            for value, members in by_value(labels, self.by).items()
            for index in shuffled(members, derive(seed, "members", value))
        ]
        sizes = apportion(len(ordered), [1.0] * (count * self.per_client))
        shards = list(sharded(ordered, sizes).values())
        order = shuffled(range(len(shards)), derive(seed, "shards"))
        return {
            name: sorted(index for shard in order[i::count] for index in shards[shard])
            for i, name in enumerate(client_names(count))
        }


@dataclass(frozen=True, slots=True)
class Quantity:
    """Deal shuffled examples out in parts of very different size."""

    alpha: float | None = None
    """Sizes are Dirichlet(alpha), above 0, small is uneven; 1 where neither is given."""
    sigma: float | None = None
    """Sizes are log-normal instead, with this standard deviation of the log; 0 is equal sizes."""
    min_examples: int = 3
    """Every client has as many before the rest is sharded."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if self.alpha is not None and self.sigma is not None:
            raise ValueError(
                f"data.partition takes alpha or sigma, got both ({self.alpha} and {self.sigma})"
            )
        if self.alpha is not None:
            _check_alpha(self.alpha)
        if self.sigma is not None and not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"data.partition.sigma must be at least 0, got {self.sigma}")
        _check_min_examples(self.min_examples)

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        count = at_most(num_clients, len(labels), self.min_examples)
        rng = random.Random(derive(seed, "sizes"))
        if self.sigma is None:
            weights = _dirichlet(rng, 1.0 if self.alpha is None else self.alpha, [True] * count)
        else:
            weights = [math.exp(rng.gauss(0.0, self.sigma)) for _ in range(count)]
        rest = apportion(len(labels) - count * self.min_examples, weights)
        sizes = [self.min_examples + more for more in rest]
        return sharded(shuffled(range(len(labels)), seed), sizes)


@dataclass(frozen=True, slots=True)
class Natural:
    """Make one client of every value of a label: a language, an author, a file."""

    by: str
    """The label; `file` where the source is a folder with one file per client."""
    largest: int | None = None
    """Take only as many clients, those with the most examples; what the others have is left out, and counted."""

    def __post_init__(self) -> None:
        """Refuse to take nobody."""
        if self.largest is not None and self.largest < 1:
            raise ValueError(
                f"data.partition.natural.largest must be at least 1, got {self.largest}"
            )

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client: as many as values, or the `largest`; no other number counts."""
        groups = by_value(labels, self.by)
        if self.largest is not None and self.largest > len(groups):
            raise ValueError(
                f"data.partition.natural.largest is {self.largest}, but the label {self.by!r} has only "
                f"{len(groups)} values: lower it, or leave it out to take them all"
            )
        largest = sorted(groups, key=lambda value: -len(groups[value]))[: self.largest]
        names = safe_names(sorted(largest))
        return dict(sorted((names[value], groups[value]) for value in largest))


Partition = Iid | Dirichlet | Shards | Quantity | Natural | Clusters | MultiDomain
PARTITIONS: dict[str, type[Partition]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "shards": Shards,
    "quantity": Quantity,
    "natural": Natural,
    "clusters": Clusters,
    "multi_domain": MultiDomain,
}


def stratum(partition: Partition) -> str | None:
    """Return the label a partition goes by."""
    return None if isinstance(partition, Iid | Quantity) else partition.by


def _check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"data.partition.alpha must be above 0, got {alpha}")


def _check_min_examples(min_examples: int) -> None:
    if min_examples < 0:
        raise ValueError(f"data.partition.min_examples must be at least 0, got {min_examples}")


def _dirichlet(rng: random.Random, alpha: float, takes: Sequence[bool]) -> list[float]:
    """Return the weights of all who are open, 0 for the others."""
    # log Gamma(alpha) = log Gamma(alpha + 1) + log(U) / alpha: no underflow where alpha is tiny.
    logs = [
        math.log(rng.gammavariate(alpha + 1, 1.0)) + math.log(1 - rng.random()) / alpha
        for _ in takes
    ]
    most = max(value for value, one in zip(logs, takes, strict=True) if one)
    return [math.exp(value - most) if one else 0.0 for value, one in zip(logs, takes, strict=True)]
