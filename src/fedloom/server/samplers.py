"""Who takes part in a round.

The run owns the sampler; an algorithm reads round.cohort and round.rate. A draw is a function of
the reachable clients and the round's seed, so a resumed run draws what the uninterrupted one would
have.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from fedloom.core.protocols import ClientId, Profile
from fedloom.core.randomness import generator


class Sampler(Protocol):
    """Draws cohorts."""

    @property
    def independent(self) -> bool:
        """Return whether every client is drawn on its own, as privacy amplification assumes."""
        ...

    def largest(self, num_clients: int | None) -> int | None:
        """Return the most clients of a cohort; None where that is not known without `num_clients`."""
        ...

    def rate(self, num_clients: int) -> float:
        """Return the expected share of `num_clients` in a cohort, (0, 1], known before the draw."""
        ...

    def draw(self, population: Mapping[ClientId, Profile], seed: int) -> Sequence[ClientId]:
        """Return the cohort, sorted by id; the order of the population does not matter."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """A fixed number of clients, all with the same chance, without replacement."""

    independent: ClassVar[bool] = False

    size: int
    """Clients a round."""

    def __post_init__(self) -> None:
        _check_size("uniform", self.size)

    def largest(self, num_clients: int | None) -> int | None:
        return self.size

    def rate(self, num_clients: int) -> float:
        _check_enough("uniform", self.size, num_clients)
        return self.size / num_clients

    def draw(self, population: Mapping[ClientId, Profile], seed: int) -> Sequence[ClientId]:
        _check_enough("uniform", self.size, len(population))
        clients = sorted(population)
        order = torch.randperm(len(clients), generator=generator(seed, "cohort"))
        return sorted(clients[i] for i in order[: self.size].tolist())


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same clients in every round."""

    independent: ClassVar[bool] = False

    clients: tuple[ClientId, ...]
    """Their ids."""

    def __post_init__(self) -> None:
        if not self.clients:
            raise ValueError("cohort.fixed.clients must name at least one client, got none")
        twice = sorted({c for c in self.clients if self.clients.count(c) > 1})
        if twice:
            raise ValueError(
                f"cohort.fixed.clients must name a client once, got {twice[0]!r} again"
            )

    def largest(self, num_clients: int | None) -> int | None:
        return len(self.clients)

    def rate(self, num_clients: int) -> float:
        _check_enough("fixed", len(self.clients), num_clients)
        return len(self.clients) / num_clients

    def draw(self, population: Mapping[ClientId, Profile], seed: int) -> Sequence[ClientId]:
        for client in self.clients:
            if client not in population:
                known = ", ".join(sorted(population)[:5])
                raise ValueError(
                    f"cohort.fixed.clients must be among the reachable clients"
                    f" ({len(population)}, first {known}), got {client!r}"
                )
        return sorted(self.clients)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A fixed number of clients without replacement, each next one in proportion to its weight."""

    independent: ClassVar[bool] = False

    size: int
    """Clients a round."""
    by: str = "num_examples"
    """Entry of a client's profile that is its weight, a positive number."""

    def __post_init__(self) -> None:
        _check_size("weighted", self.size)

    def largest(self, num_clients: int | None) -> int | None:
        return self.size

    def rate(self, num_clients: int) -> float:
        _check_enough("weighted", self.size, num_clients)
        return self.size / num_clients

    def draw(self, population: Mapping[ClientId, Profile], seed: int) -> Sequence[ClientId]:
        _check_enough("weighted", self.size, len(population))
        clients = sorted(population)
        weights = [self._weight(client, population[client]) for client in clients]
        chances = torch.rand(len(clients), generator=generator(seed, "cohort"), dtype=torch.float64)
        # Efraimidis and Spirakis 2006: the largest u^(1/w), in logarithms
        winners = torch.topk(
            chances.log() / torch.tensor(weights, dtype=torch.float64), self.size
        ).indices
        return sorted(clients[i] for i in winners.tolist())

    def _weight(self, client: ClientId, profile: Profile) -> float:
        if self.by not in profile:
            known = ", ".join(sorted(profile)) or "nothing"
            raise ValueError(
                f"cohort.weighted.by must be in every client's profile,"
                f" got {self.by!r} while {client} has {known}"
            )
        try:
            weight = float(profile[self.by])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(
                f"cohort.weighted.by must name a positive number,"
                f" got {profile[self.by]!r} as {self.by!r} of {client}"
            )
        return weight


@dataclass(frozen=True, slots=True)
class Full:
    """Everybody, in every round."""

    independent: ClassVar[bool] = False

    def largest(self, num_clients: int | None) -> int | None:
        return num_clients

    def rate(self, num_clients: int) -> float:
        return 1.0

    def draw(self, population: Mapping[ClientId, Profile], seed: int) -> Sequence[ClientId]:
        return sorted(population)


@dataclass(frozen=True, slots=True)
class Poisson:
    """Each client on its own with chance q, perhaps nobody: what privacy amplification assumes."""

    independent: ClassVar[bool] = True

    q: float
    """Chance of taking part, (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise ValueError(f"cohort.poisson.q must be in (0, 1], got {self.q}")

    def largest(self, num_clients: int | None) -> int | None:
        return num_clients

    def rate(self, num_clients: int) -> float:
        return self.q

    def draw(self, population: Mapping[ClientId, Profile], seed: int) -> Sequence[ClientId]:
        clients = sorted(population)
        chances = torch.rand(len(clients), generator=generator(seed, "cohort"), dtype=torch.float64)
        return [client for client, u in zip(clients, chances.tolist(), strict=True) if u < self.q]


@dataclass(frozen=True, slots=True)
class Without:
    """The cohorts that another sampler draws among more clients, less those who are never there."""

    inner: Sampler
    absent: Mapping[ClientId, Profile]
    """Who is drawn and does not come."""

    @property
    def independent(self) -> bool:
        return self.inner.independent

    def largest(self, num_clients: int | None) -> int | None:
        return self.inner.largest(None if num_clients is None else num_clients + len(self.absent))

    def rate(self, num_clients: int) -> float:
        return self.inner.rate(num_clients + len(self.absent))

    def draw(self, population: Mapping[ClientId, Profile], seed: int) -> Sequence[ClientId]:
        drawn = self.inner.draw({**population, **self.absent}, seed)
        return [client for client in drawn if client not in self.absent]


SAMPLERS: dict[str, type[Sampler]] = {
    "uniform": Uniform,
    "fixed": Fixed,
    "weighted": Weighted,
    "full": Full,
    "poisson": Poisson,
}


def _check_size(sampler: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"cohort.{sampler}.size must be at least 1, got {size}")


def _check_enough(sampler: str, size: int, num_clients: int) -> None:
    if size > num_clients:
        field = "clients" if sampler == "fixed" else "size"
        raise ValueError(
            f"cohort.{sampler}.{field} must be at most the {num_clients} reachable clients,"
            f" got {size}"
        )
