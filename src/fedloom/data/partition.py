"""Which client holds which example: iid, skewed by label or by size, or as the data came.

Every kind assigns whole examples to clients; `splits.py` then cuts each client's own, so that its training,
validation and test examples come from one distribution.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.core.protocols import ClientId
from fedloom.core.seeds import derive

Labels = Mapping[str, str]
Assignment = dict[ClientId, list[int]]

DEFAULT_CLIENTS = 10
DRAWS = 200
"""Dirichlet draws tried before a client below `min_examples` is an error."""


@dataclass(frozen=True, slots=True)
class Iid:
    """Deal shuffled examples out in equal parts."""

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        count = _at_most(num_clients, len(labels))
        return _dealt(shuffled(range(len(labels)), seed), apportion(len(labels), [1.0] * count))


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
    """Draw again until every client has as many."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        _check_alpha(self.alpha)
        _check_min_examples(self.min_examples)

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        groups = _by_value(labels, self.by)
        count = _at_most(num_clients, len(labels), self.min_examples)
        most: list[int] = []
        for draw in range(DRAWS):
            rng = random.Random(derive(seed, "dirichlet", draw))
            shares = {
                value: apportion(len(members), _dirichlet(rng, self.alpha, count))
                for value, members in groups.items()
            }
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
            dealt = _dealt(shuffled(members, derive(seed, "members", value)), shares[value])
            for name, indices in dealt.items():
                clients[name] += indices
        return {name: sorted(indices) for name, indices in clients.items()}


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
        """Refuse what cannot be dealt."""
        if self.per_client < 1:
            raise ValueError(f"data.partition.per_client must be at least 1, got {self.per_client}")

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client."""
        count = _at_most(num_clients, len(labels), self.per_client)
        ordered = [
            index
            for value, members in _by_value(labels, self.by).items()
            for index in shuffled(members, derive(seed, "members", value))
        ]
        sizes = apportion(len(ordered), [1.0] * (count * self.per_client))
        shards = list(_dealt(ordered, sizes).values())
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
    """Every client has as many before the rest is dealt."""

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
        count = _at_most(num_clients, len(labels), self.min_examples)
        rng = random.Random(derive(seed, "sizes"))
        if self.sigma is None:
            weights = _dirichlet(rng, 1.0 if self.alpha is None else self.alpha, count)
        else:
            weights = [math.exp(rng.gauss(0.0, self.sigma)) for _ in range(count)]
        rest = apportion(len(labels) - count * self.min_examples, weights)
        sizes = [self.min_examples + more for more in rest]
        return _dealt(shuffled(range(len(labels)), seed), sizes)


@dataclass(frozen=True, slots=True)
class Natural:
    """Make one client of every value of a label: a language, an author, a file."""

    by: str
    """The label; `file` where the source is a folder with one file per client."""

    def assign(self, labels: Sequence[Labels], num_clients: int | None, seed: int) -> Assignment:
        """Return the indices of the examples of each client; of the `num_clients` largest where it is given."""
        groups = _by_value(labels, self.by)
        if num_clients is not None and num_clients > len(groups):
            raise ValueError(
                f"data.num_clients is {num_clients}, but the label {self.by!r} has only {len(groups)} values: "
                f"lower it, or leave it out to take them all"
            )
        largest = sorted(groups, key=lambda value: -len(groups[value]))[:num_clients]
        names = safe_names(sorted(largest))
        return dict(sorted((names[value], groups[value]) for value in largest))


Partition = Iid | Dirichlet | Shards | Quantity | Natural
PARTITIONS: dict[str, type[Partition]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "shards": Shards,
    "quantity": Quantity,
    "natural": Natural,
}


def stratum(partition: Partition) -> str | None:
    """Return the label a partition goes by."""
    return partition.by if isinstance(partition, Dirichlet | Shards | Natural) else None


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


def client_names(count: int) -> list[ClientId]:
    """Return client-000, client-001, ..., which sort as they count."""
    width = max(3, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]


def safe_names(values: Sequence[str]) -> dict[str, ClientId]:
    """Return a name for every value that any file system takes and no two share, even where case is ignored."""
    names: dict[str, ClientId] = {}
    taken: set[str] = set()
    for value in values:
        stem = re.sub(r"[^\w.-]+", "-", value).strip("-.")[:80] or "client"
        name, number = stem, 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        names[value] = name
    return names


def _at_most(num_clients: int | None, num_examples: int, each: int = 1) -> int:
    count = DEFAULT_CLIENTS if num_clients is None else num_clients
    if count * each > num_examples:
        raise ValueError(
            f"data.num_clients is {count} with at least {each} examples each, but there are only {num_examples} "
            "examples: lower it, or give more data"
        )
    return count


def _check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"data.partition.alpha must be above 0, got {alpha}")


def _check_min_examples(min_examples: int) -> None:
    if min_examples < 1:
        raise ValueError(f"data.partition.min_examples must be at least 1, got {min_examples}")


def _by_value(labels: Sequence[Labels], by: str) -> dict[str, list[int]]:
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


def _dealt(items: Sequence[int], sizes: Sequence[int]) -> Assignment:
    names = client_names(len(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        name: sorted(items[start : start + size])
        for name, start, size in zip(names, starts, sizes, strict=True)
    }


def _dirichlet(rng: random.Random, alpha: float, count: int) -> list[float]:
    # log Gamma(alpha) = log Gamma(alpha + 1) + log(U) / alpha: no underflow where alpha is tiny.
    logs = [
        math.log(rng.gammavariate(alpha + 1, 1.0)) + math.log(1 - rng.random()) / alpha
        for _ in range(count)
    ]
    return [math.exp(value - max(logs)) for value in logs]
