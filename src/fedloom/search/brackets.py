"""How long trials run: which rounds they are compared after, and how many of them go on; numbers alone.

Non-stochastic Best Arm Identification and Hyperparameter Optimization. Jamieson, Talwalkar, AISTATS 2016 (arXiv:1502.07943).

Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization. Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar, JMLR 2018
(arXiv:1603.06560), Algorithm 1. Deviation: a trial goes on from its checkpoint, so that a rung costs what it is beyond the one
before, not its whole length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Halving:
    """How trials are stopped early."""

    eta: int = 3
    """One in so many goes on to the next rung, which is so many times longer."""
    min_rounds: int = 1
    """Of the first rung."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.eta < 2:
            raise ValueError(f"eta must be at least 2, got {self.eta}")
        if self.min_rounds < 1:
            raise ValueError(f"min_rounds must be at least 1, got {self.min_rounds}")

    def rungs(self, rounds: int) -> list[int]:
        """Return the rounds after which trials are compared, the last of them `rounds`."""
        found = [rounds]
        while found[0] // self.eta >= self.min_rounds:
            found.insert(0, found[0] // self.eta)
        return found


@dataclass(frozen=True, slots=True)
class Bracket:
    """Trials that begin together."""

    size: int
    """How many of them."""
    rungs: tuple[int, ...]
    """Rounds after which they are compared; the last is where a trial ends."""
    eta: int = 1

    @property
    def sizes(self) -> list[int]:
        """Return how many trials run to each rung."""
        return [max(1, self.size // self.eta**at) for at in range(len(self.rungs))]

    @property
    def cost(self) -> int:
        """Return the rounds of all trials together."""
        steps = [b - a for a, b in zip((0, *self.rungs), self.rungs, strict=False)]
        return sum(size * step for size, step in zip(self.sizes, steps, strict=True))


def plain(rounds: int, *, count: int) -> list[Bracket]:
    """Return trials one after another, each to its end."""
    return [Bracket(1, (rounds,))] * count


def halved(halving: Halving, rounds: int, *, size: int | None = None) -> Bracket:
    """Return one bracket; of as many trials as leave one at the end, if that is not given."""
    rungs = halving.rungs(rounds)
    number = halving.eta ** (len(rungs) - 1) if size is None else size
    return Bracket(number, tuple(rungs), halving.eta)


def hyperband(halving: Halving, rounds: int) -> list[Bracket]:
    """Return the brackets of Hyperband, the one that begins with the most trials first."""
    rungs = halving.rungs(rounds)
    most = len(rungs) - 1
    sizes = [-(-(most + 1) * halving.eta**s // (s + 1)) for s in range(most + 1)]
    return [Bracket(sizes[s], tuple(rungs[most - s :]), halving.eta) for s in range(most, -1, -1)]


def affordable(brackets: Sequence[Bracket], rounds: int) -> Iterator[Bracket]:
    """Yield the first brackets, as many as there are rounds for."""
    for bracket in brackets:
        rounds -= bracket.cost
        if rounds < 0:
            return
        yield bracket
