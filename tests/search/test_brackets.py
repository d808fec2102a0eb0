"""How long trials run, by hand."""

import pytest

from fedloom.search.brackets import Bracket, Halving, affordable, halved, hyperband


def test_rungs_are_eta_times_as_long_and_end_with_the_whole() -> None:
    assert Halving().rungs(9) == [1, 3, 9]
    assert Halving(3, 2).rungs(9) == [3, 9]
    assert Halving(2, 1).rungs(14) == [1, 3, 7, 14]
    assert Halving(3, 10).rungs(9) == [9]


def test_nine_trials_by_thirds_take_a_quarter_of_the_grid() -> None:
    """By hand: 9 x 1 + 3 x 2 + 1 x 6 rounds, as a trial goes on where it was; the grid takes 9 x 9."""
    bracket = halved(Halving(), 9)
    assert (bracket.size, bracket.sizes, bracket.cost) == (9, [9, 3, 1], 21)
    assert bracket.cost <= 0.4 * 9 * 9
    assert halved(Halving(), 9, size=4).sizes == [4, 1, 1]


def test_hyperband_has_the_brackets_of_its_paper() -> None:
    """Li et al., table 1, of R = 81 and eta = 3: 81 trials from 1, 34 from 3, 15 from 9, 8 from 27, 5 from 81."""
    found = hyperband(Halving(), 81)
    assert [(b.size, b.rungs[0]) for b in found] == [(81, 1), (34, 3), (15, 9), (8, 27), (5, 81)]
    assert found[1].sizes == [34, 11, 3, 1]


def test_brackets_end_where_rounds_do() -> None:
    three = [Bracket(1, (5,))] * 3
    assert len(list(affordable(three, 14))) == 2
    assert list(affordable(three, 4)) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Halving(1), "eta must be at least 2, got 1"),
        (lambda: Halving(3, 0), "min_rounds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
