"""The event clock of a simulation: how long each client's training would take, a pure function of recipe, seed and profile.

Nothing here looks at a real clock, so that the order of events, and with it every number of a run, is the same on any machine.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedloom.core.protocols import ClientId, Profile, Round
from fedloom.core.randomness import derive, generator


@dataclass(frozen=True, slots=True)
class Clock:
    """Section `clock`: virtual seconds of a client's round, its messages included."""

    seconds: float = 1.0
    """Of the median client in a tier that is not named."""
    tiers: Mapping[str, float] = field(default_factory=dict)
    """How many times as long clients of a tier take; those of `data.tiers`, 1 if not named."""
    spread: float = 0.0
    """Standard deviation of the logarithm of a factor that is drawn for every training anew; 0: none."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"clock.seconds must be a positive number, got {self.seconds}")
        for tier, factor in self.tiers.items():
            if not 0 < factor < math.inf:
                raise ValueError(f"clock.tiers.{tier} must be a positive number, got {factor}")
        if not 0 <= self.spread <= 3:
            raise ValueError(f"clock.spread must be in [0, 3], got {self.spread}")


@dataclass(frozen=True)
class Durations:
    """A clock with the work of each client."""

    clock: Clock
    steps: Mapping[ClientId, int]
    """Optimizer steps of one round."""

    def of(self, client: ClientId, profile: Profile, *, round_seed: int) -> float:
        """Return the virtual seconds of one training.

        Args:
            client: Whose.
            profile: What is known of it.
            round_seed: Of the round in which it begins.
        """
        clock, usual = self.clock, statistics.median(self.steps.values())
        share = self.steps[client] / usual if usual else 1.0
        factor = clock.tiers.get(profile.get("tier", ""), 1.0)
        if clock.spread:
            source = generator(derive(round_seed, client), "duration")
            drawn = torch.randn((), generator=source, dtype=torch.float64)
            factor *= math.exp(clock.spread * float(drawn))
        return clock.seconds * factor * share

    def of_cohort(self, round: Round) -> float:
        """Return the virtual seconds of a round in which everybody is waited for."""
        each = (
            self.of(client, round.population[client], round_seed=round.seed)
            for client in round.cohort
        )
        return max(each, default=0.0)
