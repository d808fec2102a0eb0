"""Epsilon is dp-accounting's, to the digit, and calibration undoes it."""

import importlib.util
import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedloom.privacy.accountant import Ledger, calibrate, check_installed

TABLE = [
    (10 / 500, 1.0, 200, 1e-5, 1.8527, 2.2298),
    (10 / 350, 1.0, 200, 1e-5, 2.6680, 3.0901),
    (0.01, 1.0, 1000, 1e-5, 1.8282, 2.1014),
    (0.001, 0.5, 1000, 1e-7, 5.1716, 6.2502),
    (1.0, 10.0, 100, 1e-5, 4.3772, 4.7285),
]
"""Rate, noise multiplier, rounds, delta; epsilon by privacy loss distributions and by moments."""


def theirs(kind: type, rate: float, z: float, rounds: int, delta: float) -> float:
    gaussian = dp_accounting.GaussianDpEvent(z)
    sampled = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    event = dp_accounting.SelfComposedDpEvent(sampled, rounds)
    return float(kind().compose(event).get_epsilon(delta))


@pytest.mark.parametrize(("rate", "z", "rounds", "delta", "epsilon", "moments"), TABLE)
def test_epsilon_is_that_of_dp_accounting(
    rate: float, z: float, rounds: int, delta: float, epsilon: float, moments: float
) -> None:
    ours = Ledger(((rate, z, rounds),)).epsilon(delta)
    assert ours == pytest.approx(epsilon, rel=1e-4)
    assert ours == pytest.approx(theirs(PLDAccountant, rate, z, rounds, delta), rel=1e-9)
    assert theirs(RdpAccountant, rate, z, rounds, delta) == pytest.approx(moments, rel=1e-4)
    assert ours < moments, "moments are looser, so that they bound it"


def test_without_sampling_it_is_the_closed_form_of_the_gaussian_mechanism() -> None:
    """Balle, Wang, ICML 2018, theorem 8: delta of one release with sensitivity over std of mu."""
    mu = math.sqrt(100) / 10.0
    epsilon = Ledger(((1.0, 10.0, 100),)).epsilon(1e-5)

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    tail = normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)
    assert tail == pytest.approx(1e-5, rel=1e-3)


def test_a_ledger_counts_releases_that_follow_one_another_together() -> None:
    ledger = Ledger()
    assert ledger.epsilon(1e-5) == 0
    for z in (2.0, 2.0, 3.0, 2.0):
        ledger = ledger.spend(0.1, z)
    assert ledger.releases == ((0.1, 2.0, 2), (0.1, 3.0, 1), (0.1, 2.0, 1))
    assert ledger.num_releases == 4
    together = PLDAccountant()
    for z, times in ((2.0, 3), (3.0, 1)):
        gaussian = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(z))
        together.compose(dp_accounting.SelfComposedDpEvent(gaussian, times))
    assert ledger.epsilon(1e-5) == pytest.approx(together.get_epsilon(1e-5), rel=1e-6)


def test_little_noise_is_counted_on_a_coarser_grid_and_not_too_low() -> None:
    coarse = Ledger(((0.5, 0.3, 2),)).epsilon(1e-5)
    exact = theirs(PLDAccountant, 0.5, 0.3, 2, 1e-5)
    assert exact <= coarse < 1.001 * exact


def test_what_was_released_without_noise_has_no_epsilon() -> None:
    assert Ledger().spend(0.1, 1.0).spend(0.1, 0.0).epsilon(1e-5) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "rounds", "known"),
    [
        (2.0, 1e-5, 0.01, 1000, 0.9591),
        (1.0, 1e-3, 1.0, 5, None),
        (0.05, 1e-5, 0.5, 2, None),
        pytest.param(8.0, 1e-5, 0.01, 1000, 0.5863, marks=pytest.mark.slow),
        pytest.param(0.05, 0.3, 0.5, 2, None, marks=pytest.mark.slow),
        pytest.param(90.0, 1e-6, 1.0, 1, None, marks=pytest.mark.slow),
    ],
)
def test_a_calibrated_multiplier_spends_the_budget_and_no_more(
    epsilon: float, delta: float, rate: float, rounds: int, known: float | None
) -> None:
    z = calibrate(epsilon, delta, rate=rate, rounds=rounds)
    assert known is None or z == pytest.approx(known, rel=2e-3)
    assert 0.998 * epsilon <= Ledger(((rate, z, rounds),)).epsilon(delta) <= epsilon


def test_without_dp_accounting_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'fedloom\[dp\]'"):
        check_installed()


def test_sums_of_one_round_have_one_cohort_and_so_cost_more_than_two_draws_of_it() -> None:
    """Sampled once, then composed: as dp-accounting counts one sampled Gaussian of z / sqrt(2)."""
    rounds = [(n, "once", 0.1, 1.0) for n in range(1, 20)]
    repeated = Ledger.of([*rounds, (7, "again", 0.1, 1.0)])
    assert [count for *_, count in repeated.releases] == [6, 1, 12]
    once = PLDAccountant()
    for count, z in ((18, 1.0), (1, 1 / math.sqrt(2))):
        gaussian = dp_accounting.GaussianDpEvent(z)
        once.compose(dp_accounting.PoissonSampledDpEvent(0.1, gaussian), count)
    assert repeated.epsilon(1e-5) == pytest.approx(float(once.get_epsilon(1e-5)), rel=1e-6)
    anew = Ledger(((0.1, 1.0, 20),)).epsilon(1e-5)
    assert repeated.epsilon(1e-5) > 1.1 * anew > 1.1 * Ledger.of(rounds).epsilon(1e-5)


def test_repeats_of_everybody_are_as_many_rounds() -> None:
    several = Ledger.of([(1, seal, 1.0, 2.0) for seal in "abc"])
    assert several.epsilon(1e-5) == pytest.approx(Ledger(((1.0, 2.0, 3),)).epsilon(1e-5), rel=1e-3)
    unlike = Ledger.of([(1, "a", 1.0, 2.0), (1, "b", 0.5, 3.0)])
    ((rate, z, count),) = unlike.releases
    assert (rate, count) == (1.0, 1), "the larger chance"
    assert z == pytest.approx((2.0**-2 + 3.0**-2) ** -0.5)


def test_a_sum_without_noise_is_not_made_up_for_by_another() -> None:
    assert Ledger.of([(1, "a", 1.0, 0.0), (1, "b", 1.0, 9.0)]).epsilon(1e-5) == math.inf


def test_next_to_no_noise_has_an_epsilon_too() -> None:
    """Where losses overflow, a bound that holds where they do not as well: 3 / (2 z^2) and the root of 6 ln(1 / delta) / z^2."""
    for z in (1e-2, 1e-5):
        bound = 1.5 / z**2 + (6 * math.log(1e5)) ** 0.5 / z
        assert 0.99 * bound < Ledger(((1.0, z, 3),)).epsilon(1e-5) <= bound * (1 + 1e-12)
