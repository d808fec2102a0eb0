"""Rules that choose whom to believe: Krum and what is built on it.

Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. Blanchard, El Mhamdi, Guerraoui, Stainer, NeurIPS
2017 (arXiv:1703.02757): Krum and Multi-Krum.

The Hidden Vulnerability of Distributed Learning in Byzantium. El Mhamdi, Guerraoui, Rouault, ICML 2018
(arXiv:1802.07927): Bulyan, its clients taken by Krum one after another.

Clients count alike, whatever their weight.
"""

from dataclasses import dataclass

from fedloom.core.protocols import Params
from fedloom.server.combine.products import squared_distances
from fedloom.server.combine.robust import Robust, Updates
from fedloom.server.combine.sorted import nearest_median
from fedloom.server.combine.weights import best, krum_scores, picked_in_turn, relative, summed


@dataclass(frozen=True, slots=True)
class Krum(Robust):
    """The one update with the nearest neighbours."""

    attackers: int
    """Bad clients a round at most; it takes twice as many replies and three."""

    def __post_init__(self) -> None:
        _check(self.rule, self.attackers)

    @property
    def rule(self) -> str:
        return "krum"

    @property
    def least(self) -> int:
        return 2 * self.attackers + 3

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        return _mean_of_best(arrived, self.attackers, 1)


@dataclass(frozen=True, slots=True)
class MultiKrum(Robust):
    """The mean of the updates with the nearest neighbours."""

    attackers: int
    """Bad clients a round at most; it takes twice as many replies and three."""
    chosen: int | None = None
    """Updates that are averaged; None: all but as many as there may be attackers."""

    def __post_init__(self) -> None:
        _check(self.rule, self.attackers)
        if self.chosen is not None and self.chosen < 1:
            raise ValueError(f"combine.multi_krum.chosen must be at least 1, got {self.chosen}")

    @property
    def rule(self) -> str:
        return "multi_krum"

    @property
    def least(self) -> int:
        return max(2 * self.attackers + 3, (self.chosen or 0) + self.attackers)

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        count = self.chosen or len(arrived.sent) - self.attackers
        return _mean_of_best(arrived, self.attackers, count)


@dataclass(frozen=True, slots=True)
class Bulyan(Robust):
    """Krum's choices one after another, and of every number those nearest the median."""

    attackers: int
    """Bad clients a round at most; it takes four times as many replies and three."""

    def __post_init__(self) -> None:
        _check(self.rule, self.attackers)

    @property
    def rule(self) -> str:
        return "bulyan"

    @property
    def least(self) -> int:
        return 4 * self.attackers + 3

    def of(self, arrived: Updates) -> tuple[Params, list[float]]:
        deltas = arrived.deltas
        count = len(deltas) - 2 * self.attackers
        distances = squared_distances(arrived.products)
        taken = sorted(picked_in_turn(distances, self.attackers, count))
        keep = count - 2 * self.attackers
        delta, used = nearest_median([deltas[at] for at in taken], keep)
        parts = dict(zip(taken, relative(used, [keep / count] * count), strict=True))
        return delta, [parts.get(at, 0.0) for at in range(len(deltas))]


def _mean_of_best(arrived: Updates, attackers: int, count: int) -> tuple[Params, list[float]]:
    taken = best(krum_scores(squared_distances(arrived.products), attackers), count)
    influence = [float(at in taken) for at in range(len(arrived.sent))]
    return summed(arrived.deltas, [part / count for part in influence]), influence


def _check(rule: str, attackers: int) -> None:
    if attackers < 1:
        raise ValueError(f"combine.{rule}.attackers must be at least 1, got {attackers}")
