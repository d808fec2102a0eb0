"""Two groups of scores: hand values, ties, few false positives, intervals that hold what they say."""

import numpy as np
import pytest

from fedloom.audit.scores import auc, separation, true_positives


def test_area_counts_pairs_and_ties_as_half() -> None:
    assert auc([3, 4], [1, 2]) == 1.0
    assert auc([1, 2], [3, 4]) == 0.0
    assert auc([1, 1], [1, 1]) == 0.5
    # Of six pairs: 2 > 1 twice, 2 = 2 twice as half, 0 < both.
    assert auc([2, 2, 0], [1, 2]) == pytest.approx(3 / 6)


def test_true_positives_allow_one_false_one_in_a_hundred() -> None:
    second = [float(i) for i in range(100)]
    assert true_positives([98.5, 97.5, 200.0, 50.0], second) == 0.5, "98.5 and 200 pass 98"
    assert true_positives([98.5, 99.5], second[:99]) == 1.0, (
        "of 99 none may pass, and 98 is the highest"
    )
    assert true_positives([98.0], second) == 0.0, "a tie with the threshold does not pass"


def test_intervals_hold_the_value_come_from_the_seed_and_shrink_with_the_counts() -> None:
    draws = np.random.default_rng(1)
    first, second = draws.normal(0.5, 1, 800), draws.normal(0, 1, 800)
    many = separation(first.tolist(), second.tolist(), seed=3)
    few = separation(first[:50].tolist(), second[:50].tolist(), seed=3)
    # Of normals half a deviation apart the area is Phi(0.5 / sqrt 2).
    assert many.auc.low < 0.6382 < many.auc.high
    assert many.auc.low < many.auc.value < many.auc.high
    assert many.auc.high - many.auc.low < 0.4 * (few.auc.high - few.auc.low)
    assert many == separation(first.tolist(), second.tolist(), seed=3)
    assert many != separation(first.tolist(), second.tolist(), seed=4)
    assert (many.num_first, few.num_second) == (800, 50)


def test_a_group_without_scores_or_with_ones_that_are_none_is_refused() -> None:
    with pytest.raises(ValueError, match="the second group has no scores"):
        auc([1.0], [])
    with pytest.raises(ValueError, match="the first group has scores that are not finite"):
        separation([float("nan")], [1.0], seed=0)
