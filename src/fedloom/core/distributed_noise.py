"""Noise that clients add to what is summed under masks."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class NoiseShares:
    """What each client adds to its upload before it is masked."""

    std: float
    """Standard deviation, by entry."""
    num_sums: int
    """How many sums a client takes part in at most: what is accounted for."""


@runtime_checkable
class AddsShares(Protocol):
    """An algorithm whose clients may add shares of noise."""

    @property
    def shares(self) -> NoiseShares | None:
        """Return them; None where clients add nothing."""
        ...
