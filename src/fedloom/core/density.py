"""What share of the entries is kept, by round and by a client's tier."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedloom.core.protocols import Algorithm, Profile


@dataclass(frozen=True, slots=True)
class Density:
    """A share of entries, (0, 1], that may change by round and differ by tier."""

    start: float = 0.25
    """Share of the entries that are kept; where `tiers` name a client's, theirs."""
    decay: float = 1.0
    """What the share is multiplied by after every `every` rounds, (0, 1]; 1 is constant."""
    every: int = 1
    """Rounds between two decays."""
    least: float = 0.0
    """The share never decays below this."""
    warm: int = 0
    """First rounds in which everything is kept; decay counts from the first round after them."""
    tiers: Mapping[str, float] = field(default_factory=dict)
    """Shares by the `tier` of a client's profile, in the place of `start`."""

    def __post_init__(self) -> None:
        shares = {"start": self.start, "decay": self.decay}
        shares |= {f"tiers.{tier}": share for tier, share in self.tiers.items()}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"a density's {name} must be in (0, 1], got {share}")
        if not 0 <= self.least <= min(self.start, *self.tiers.values(), 1.0):
            raise ValueError(
                f"a density's least must be in [0, start], and below every tier's, got {self.least}"
            )
        if self.every < 1:
            raise ValueError(f"a density's every must be at least 1, got {self.every}")
        if self.warm < 0:
            raise ValueError(f"a density's warm must be a number of rounds, got {self.warm}")

    def at(self, round: int, profile: Profile) -> float:
        """Return the share of a client in a round, counted from 1: the same on both sides."""
        if round <= self.warm:
            return 1.0
        share = self.tiers.get(profile.get("tier", ""), self.start)
        return max(share * self.decay ** ((round - 1 - self.warm) // self.every), self.least)

    @property
    def thins(self) -> bool:
        """Return whether there may be a client in whose messages anything is left out."""
        return min(self.start, self.decay, *self.tiers.values()) < 1


def check_comparable(inner: Algorithm[Any], setting: str, *, apart: bool) -> None:
    """Refuse uploads of entries that differ by client where the server compares whole ones: what is missing is no zero."""
    if apart and inner.server_sees == "each in full":
        raise ValueError(
            f"{setting} gives every client a mask of its own, but a robust combine below it compares uploads entry by"
            " entry: take one share for all of them, or combine: mean"
        )
