"""The bound of one run: its hand value, the paper's own, what refutes nothing, and that it is seldom too high."""

import math

import numpy as np
import pytest

from fedloom.audit.bounds import best_guesses, epsilon_low, p_value


def test_a_hundred_right_guesses_refute_what_the_formula_says() -> None:
    right = 0.05 ** (1 / 100)
    assert epsilon_low(100, 100, 100) == pytest.approx(math.log(right / (1 - right)), abs=1e-6)
    assert epsilon_low(100, 100, 100) == pytest.approx(3.4930, abs=5e-5)


def test_the_delta_term_is_that_of_the_paper() -> None:
    # Appendix D prints 0.673 for a thousand canaries, a hundred guesses, of which 75 right, delta 1e-4.
    assert epsilon_low(1000, 100, 75, delta=1e-4) == pytest.approx(0.673, abs=5e-4)
    assert epsilon_low(1000, 100, 75) > epsilon_low(1000, 100, 75, delta=1e-4)


def test_guesses_no_better_than_coins_refute_nothing() -> None:
    assert epsilon_low(100, 100, 50) == 0.0
    assert p_value(100, 100, 0, epsilon=0.0, delta=0.0) == 1.0


def test_a_bound_is_too_high_in_at_most_one_of_twenty() -> None:
    """Randomised response at epsilon 1 is as bad as an epsilon-private mechanism can be."""
    draws, too_high = np.random.default_rng(5), 0
    for _ in range(300):
        coins = draws.random(200) < 0.5
        kept = draws.random(200) < 1 / (1 + math.exp(-1.0))
        told = np.where(kept, coins, ~coins) + draws.random(200) / 2
        too_high += best_guesses(told.tolist(), coins.tolist(), delta=0.0).epsilon_low > 1
    assert too_high / 300 <= 0.05


def test_the_best_share_pays_for_its_choice() -> None:
    coins = [bool(i % 2) for i in range(200)]
    found = best_guesses([float(coin) for coin in coins], coins, delta=0.0)
    assert (found.canaries, found.guesses, found.correct) == (200, 200, 200)
    assert found.epsilon_low == found.most == epsilon_low(200, 200, 200, alpha=0.05 / 3)
    nothing = best_guesses([0.0] * 200, coins, delta=0.0)
    assert nothing.epsilon_low == 0.0 < nothing.most


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3, 2 and 4"):
        epsilon_low(4, 2, 3)
    with pytest.raises(ValueError, match=r"got delta 1 and alpha 0\.05"):
        epsilon_low(4, 2, 2, delta=1)
    with pytest.raises(ValueError, match="got 1 and 1 scores"):
        best_guesses([0.0], [True], delta=0.0)
