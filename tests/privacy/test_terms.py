"""What is promised can be kept, or is refused in one sentence."""

import math
from typing import Any

import pytest

from fedloom.core.protocols import Round
from fedloom.privacy.accountant import Ledger
from fedloom.privacy.mechanism import Mechanism
from fedloom.privacy.terms import BudgetSpent, Terms

GOOD: dict[str, Any] = {
    "clip": 0.5,
    "epsilon": None,
    "delta": 1e-3,
    "noise_multiplier": 1.0,
    "rounds": None,
    "quantile": None,
}
BUDGET = {"epsilon": 2.0, "noise_multiplier": None, "rounds": 3}
ROUND = Round(1, 1, {f"c{i}": {} for i in range(20)}, (), 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epsilon": 1.0}, "either epsilon or noise_multiplier, got epsilon 1.0 and noise_mult"),
        ({"noise_multiplier": None}, "either epsilon or noise_multiplier, got epsilon None"),
        ({"clip": 0.0}, r"private\.clip must be a positive number, .* got 0\.0"),
        ({"clip": math.nan}, r"private\.clip must be a positive number, .* got nan"),
        ({"clip": math.inf}, r"private\.clip must be .*, as noise is a multiple of it, got inf"),
        ({**BUDGET, "clip": math.inf}, r"private\.clip must be .*, got inf"),
        ({**BUDGET, "epsilon": 0.0}, r"private\.epsilon must be above 0 and below inf, got 0\.0"),
        ({**BUDGET, "epsilon": math.nan}, r"private\.epsilon must be .* got nan"),
        ({"delta": 1.0}, r"private\.delta must be above 0 and below 1, got 1\.0"),
        ({"quantile": 1.5}, r"private\.quantile must be above 0 and below 1, got 1\.5"),
        ({"noise_multiplier": -1.0}, r"private\.noise_multiplier must be >= 0, got -1\.0"),
        ({**BUDGET, "rounds": 0}, r"private\.rounds must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_name_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Terms(**{**GOOD, **fields})


def test_a_budget_needs_to_know_for_how_many_rounds() -> None:
    with pytest.raises(ValueError, match=r"private\.rounds must say how many rounds"):
        Terms(**{**GOOD, **BUDGET, "rounds": None}).begin(None)


def test_a_delta_that_a_single_client_could_hide_in_is_refused() -> None:
    terms = Terms(**{**GOOD, "delta": 0.05})
    with pytest.raises(ValueError, match=r"below 1 / number of clients \(20\), got 0\.05"):
        terms.fund(terms.begin(0), ROUND)
    silent = Terms(**{**GOOD, "delta": 0.05, "noise_multiplier": 0.0})
    assert silent.fund(silent.begin(0), ROUND) == silent.begin(0)


def test_a_budget_is_calibrated_once_and_cannot_be_overspent() -> None:
    terms = Terms(**{**GOOD, **BUDGET})
    mechanism = terms.begin(0)
    assert mechanism.noise_multiplier is None
    spent = []
    for number in (1, 2, 3):
        mechanism = terms.fund(mechanism, ROUND)
        z = mechanism.noise_multiplier
        assert z
        mechanism = mechanism.charge([(number, "seal", ROUND.rate, z)])
        terms.settle(mechanism)
        spent.append(mechanism.ledger.epsilon(1e-3))
    assert spent == sorted(spent)
    assert 0.998 * 2 <= spent[-1] <= 2
    assert mechanism.ledger.releases == ((0.5, mechanism.noise_multiplier, 3),)
    z = mechanism.noise_multiplier or 0.0
    terms.settle(mechanism.charge([(3, "seal", ROUND.rate, z)]))  # which is there already
    for number in (3, 4):
        more = mechanism.charge([(number, "another", ROUND.rate, z)])
        with pytest.raises(
            BudgetSpent, match=r"epsilon 2\.0 is spent after 3 noisy means, .* raise"
        ):
            terms.settle(more)


def test_a_larger_share_of_clients_than_the_noise_was_made_for_is_refused_before_it_is_too_much() -> (
    None
):
    terms = Terms(**{**GOOD, **BUDGET})
    mechanism = terms.fund(terms.begin(0), ROUND)
    everybody = Round(2, 2, ROUND.population, (), 1.0)
    z = mechanism.noise_multiplier or 0.0
    assert Ledger(((1.0, z, 1),)).epsilon(1e-3) < 2 < Ledger(((1.0, z, 2),)).epsilon(1e-3)
    assert terms.fund(mechanism, everybody).noise_multiplier == z
    once = mechanism.charge([(1, "a", everybody.rate, z)])
    terms.settle(once)
    with pytest.raises(BudgetSpent, match="is spent after 1 noisy means"):
        terms.settle(once.charge([(2, "b", everybody.rate, z)]))


def test_the_key_is_not_shown() -> None:
    mechanism = Mechanism(b"secret", 1.0, 1.0)
    assert "secret" not in repr(mechanism)
