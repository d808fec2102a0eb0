"""Means, intervals and paired differences: by hand."""

import math

import pytest

from fedloom.results.statistics import mean_of, of_share, paired


def test_an_interval_is_students() -> None:
    # 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.302653.
    found = mean_of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    found = mean_of([0.5])
    assert (found.mean, found.low, found.high, found.count) == (0.5, None, None, 1)
    assert mean_of([1.0, math.inf]).half is None


def test_a_share_has_wilsons_interval() -> None:
    # 8 of 10: the textbook's 0.490 and 0.943.
    found = of_share(0.8, 10)
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)
    # None of ten right is not surely none.
    assert of_share(0.0, 10).high == pytest.approx(0.2775328, abs=1e-6)


def test_differences_are_taken_seed_by_seed() -> None:
    # Runs that differ by far between seeds and always by 0.1 between methods: the interval knows the pairs.
    own, other = {0: 1.1, 1: 2.1, 2: 5.1}, {0: 1.0, 1: 2.0, 2: 5.0, 3: 9.0}
    found = paired(own, other)
    assert found is not None
    assert found.count == 3
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0.0, abs=1e-12)
    assert paired({0: 1.0}, {1: 1.0}) is None
