"""How wide the low-rank adapters of a run are, by tier, for algorithms that add up their products."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedloom.core.protocols import Profile


@dataclass(frozen=True, slots=True)
class Ranks:
    """Widths of adapters and of what is frozen beside them; the space holds `most + side` columns of every layer."""

    most: int
    """The rank that the server's factors have, and clients whose tier has none of its own."""
    tiers: Mapping[str, int]
    """Smaller ranks by the `tier` of a client's profile."""
    side: int
    """Columns behind those that learn: a frozen pair of factors that the server writes."""
    gains: Mapping[int, float]
    """By rank, the scale of adapters of that rank over the scale of the widest."""

    def of(self, profile: Profile) -> int:
        """Return a client's rank, the same on both sides."""
        return self.tiers.get(profile.get("tier", ""), self.most)


@runtime_checkable
class HasRanks(Protocol):
    """What is tuned, where that is plain low-rank adapters."""

    @property
    def adapters(self) -> Ranks | None:
        """Return how wide they are; None where products of factors are not all that they add to a layer."""
        ...
