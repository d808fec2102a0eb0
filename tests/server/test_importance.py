"""Chances of seeds: the paper's by hand, and the better spread ones."""

import math
from typing import Any

import pytest
import torch

from fedloom.server.importance import SEED_SAMPLINGS, Alike, Power, Pro, SeedSampling


def history(*scalars: list[float], clip: float = 1000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums and counts of histories that begin with the paper's zero, which is left out."""
    seen = [[min(abs(g), clip) for g in one[1:]] for one in scalars]
    return (
        torch.tensor([sum(one) for one in seen], dtype=torch.float64),
        torch.tensor([float(len(one)) for one in seen], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("scalars", "expected"),
    [
        ([[0.0]] * 4, [0.25] * 4),
        ([[0, 4], [0, -2], [0], [0, 1e6]], [0.175394, 0.175044, 0.174694, 0.474868]),
        (
            [[0, 1, -1], [0, 3, -3, 6], [0], [0, -2]],
            [0.196275, 0.427219, 0.157165, 0.219341],
        ),
        ([[0, 5], [0, 5]], [0.5, 0.5]),
    ],
)
def test_pro_by_hand(scalars: list[list[float]], expected: list[float]) -> None:
    chances = Pro().chances(*history(*scalars))
    assert chances.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-12)


def test_pros_chances_differ_by_e_whatever_the_scalars() -> None:
    """Why there is another rule."""
    g = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 9, (1024,), generator=g).double()
    for scale in (1e-3, 1.0, 500.0):
        chances = Pro().chances(draws * scale * torch.rand(1024, generator=g), draws)
        assert float(chances.max() / chances.min()) == pytest.approx(math.e, rel=1e-6)


def test_powers_chances_follow_the_mean_size() -> None:
    sizes, draws = history([0, 4, -4], [0, 2], [0, 1, 1, 1], [0, 1])
    plain = Power(mix=0.2).chances(sizes, draws)
    by_hand = [0.8 * share / 8 + 0.05 for share in (4, 2, 1, 1)]
    assert plain.tolist() == pytest.approx(by_hand)
    steep = Power(power=2.0, mix=0.2).chances(sizes, draws)
    assert steep.tolist() == pytest.approx([0.8 * s / 22 + 0.05 for s in (16, 4, 1, 1)])


def test_a_seed_nobody_walked_along_counts_as_an_average_one() -> None:
    chances = Power(mix=0.5).chances(*history([0, 1], [0], [0, 3]))
    assert chances.tolist() == pytest.approx([0.5 * s / 6 + 1 / 6 for s in (1, 2, 3)])


@pytest.mark.parametrize("rule", [Pro(), Power(), Power(power=0.0), Power(mix=1.0)])
@pytest.mark.parametrize("size", [0.0, 7.0])
def test_equal_importances_are_uniform_chances(rule: Any, size: float) -> None:
    draws = torch.full((1024,), 3.0, dtype=torch.float64)
    chances = rule.chances(size * draws, draws)
    assert chances.tolist() == pytest.approx([1 / 1024] * 1024, rel=1e-12)
    start = rule.chances(0 * draws, 0 * draws)
    assert torch.equal(start, chances) or start.tolist() == pytest.approx([1 / 1024] * 1024)


def test_alike_says_nothing() -> None:
    alike: SeedSampling = Alike()
    assert alike.chances(*history([0, 1], [0, 2])) is None
    assert not Alike().corrected
    assert SEED_SAMPLINGS["uniform"] is Alike


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pro(clip=0.0), r"sampling\.pro\.clip must be positive, got 0\.0"),
        (lambda: Power(clip=-1.0), r"sampling\.power\.clip must be positive, got -1\.0"),
        (lambda: Power(power=-1.0), r"sampling\.power\.power must be a number >= 0, got -1\.0"),
        (lambda: Power(mix=0.0), r"sampling\.power\.mix must be in \(0, 1\], got 0\.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
