"""What a run of noisy sums tells of any one client, counted by dp-accounting (extra `dp`).

A sum of clipped uploads with Gaussian noise, over clients drawn each on its own, is a Poisson
sampled Gaussian mechanism; neighbours differ by one client more or less. Its privacy loss
distribution is composed numerically and errs on the side of more epsilon.

Mironov, Talwar, Zhang 2019 (arXiv:1908.10530), the moments that begin the search of `calibrate`;
Koskela, Jälkö, Honkela, AISTATS 2020 (arXiv:1906.03049) and Doroshenko, Ghazi, Kamath, Kumar,
Manurangsi, PoPETs 2022 (arXiv:2207.04380), privacy loss distributions. Bun, Steinke, TCC 2016 (arXiv:1605.02065), where
there is next to no noise.
"""

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from fedloom.core.description import Release

_SLACK = 2e-3
"""Share of a budget that calibration may leave unspent."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The noisy sums released so far."""

    releases: tuple[tuple[float, float, int], ...] = ()
    """In order: the chance of taking part, the noise multiplier, how many in a row were such."""

    @classmethod
    def of(cls, released: Iterable[Release]) -> "Ledger":
        """Return the ledger of these sums, where those of one round are a repeat and have one cohort.

        Whoever was drawn is then in all of them, so chance hides nobody anew: together they are one
        sum whose noise is less, z with z^-2 the sum of theirs. Two draws would count for too little.
        """
        rounds: dict[int, list[tuple[float, float]]] = {}
        for number, _, rate, z in sorted(released):
            rounds.setdefault(number, []).append((rate, z))
        ledger = cls()
        for same in rounds.values():
            ledger = ledger.spend(max(rate for rate, _ in same), _joint([z for _, z in same]))
        return ledger

    def spend(self, rate: float, noise_multiplier: float) -> "Ledger":
        """Return the ledger after one more release."""
        last = self.releases[-1] if self.releases else (math.nan, math.nan, 0)
        if last[:2] == (rate, noise_multiplier):
            return replace(self, releases=(*self.releases[:-1], (*last[:2], last[2] + 1)))
        return replace(self, releases=(*self.releases, (rate, noise_multiplier, 1)))

    @property
    def num_releases(self) -> int:
        """Return how many there were."""
        return sum(count for _, _, count in self.releases)

    def epsilon(self, delta: float) -> float:
        """Return the epsilon at which all of it together is (epsilon, delta)-private."""
        return _epsilon(self.releases, delta)


@cache
def calibrate(epsilon: float, delta: float, *, rate: float, rounds: int) -> float:
    """Return the noise multiplier with which `rounds` releases stay just within the budget.

    All but at most 0.2 % of epsilon is spent, and never more than it.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    def event(noise_multiplier: float) -> Any:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, rounds)

    def moments() -> Any:
        # Fractional orders sharpen what is only a beginning, slowly and with warnings.
        return RdpAccountant([*range(2, 65), 128, 256, 512])

    def spent(noise_multiplier: float) -> float:
        return Ledger(((rate, noise_multiplier, rounds),)).epsilon(delta)

    # Moments take milliseconds and ask for a little too much: the answer is just below theirs. From
    # there along the logarithms, by no more than half, since little noise takes long to account for.
    z = float(dp_accounting.calibrate_dp_mechanism(moments, event, epsilon, delta))
    low, high, slope, known = 0.0, math.inf, -1.5, list[tuple[float, float]]()
    while not (1 - _SLACK) * epsilon <= (here := spent(z)) <= epsilon:
        low, high = (z, high) if here > epsilon else (low, z)
        known = [*known[-1:], (math.log(z), math.log(max(here, _SLACK * epsilon)))]
        if len(known) == 2:
            (was, had), (at, has) = known
            slope = min(-0.2, (has - had) / (at - was))
        gap = math.log((1 - _SLACK / 2) * epsilon) - known[-1][1]
        step = z * math.exp(min(max(gap / slope, -0.7), 0.7))
        z = step if low < step < high else (low + high) / 2
    return z


def check_installed() -> None:
    """Refuse to promise an epsilon that nothing can count.

    Raises:
        ValueError: where dp-accounting is not installed.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise ValueError(
            "private needs dp-accounting to say what noise buys, which is not installed:"
            " pip install 'fedloom[dp]'"
        )


def _joint(multipliers: list[float]) -> float:
    """Return the noise multiplier of a sum that tells as much as sums of these do together."""
    if len(multipliers) == 1 or not all(multipliers):
        return min(multipliers)
    return 1 / math.hypot(*(1 / z for z in multipliers))


@lru_cache(maxsize=8)
def _epsilon(releases: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not releases:
        return 0.0
    if not all(noise_multiplier for _, noise_multiplier, _ in releases):
        return math.inf
    # Little noise, large losses: dp-accounting's grid of 1e-4 would take minutes for digits nobody
    # needs of an epsilon in the hundreds. A coarser one errs on the safe side too.
    grid = 1e-4 * max(1.0, (0.5 / min(z for _, z, _ in releases)) ** 2)
    try:
        total, *others = (_loss(rate, z, grid).self_compose(count) for rate, z, count in releases)
        for other in others:
            total = total.compose(other)
        return float(total.get_epsilon_for_delta(delta))
    except OverflowError:  # of an epsilon of tens of thousands
        return _concentrated(releases, delta)


def _concentrated(releases: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Return an epsilon that is never too small, as if everybody were in every sum: propositions 1.3 and 1.6 of Bun and Steinke."""
    rho = sum(count / (2 * z * z) for _, z, count in releases)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@lru_cache(maxsize=8)
def _loss(rate: float, noise_multiplier: float, grid: float) -> Any:
    """Return the privacy loss distribution of one release, in steps of `grid`."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=rate, value_discretization_interval=grid
    )
