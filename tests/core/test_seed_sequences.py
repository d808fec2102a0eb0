"""Walks: alike on both sides, unlike between tasks, every direction as likely."""

import pytest
import torch
from scipy.stats import chisquare

from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS, landed, pace, uniform_seeds, widened


def test_a_walk_is_a_function_of_its_seed() -> None:
    """The numbers are part of what clients and servers of different versions must agree on."""
    assert torch.equal(uniform_seeds(7, 200, 4096), uniform_seeds(7, 200, 4096))
    assert torch.equal(uniform_seeds(7, 5, 4096), uniform_seeds(7, 200, 4096)[:5])
    assert uniform_seeds(7, 5, 4096).tolist() == [1944, 2003, 446, 3870, 2592]


def test_no_global_generator_is_touched() -> None:
    before = torch.get_rng_state()
    uniform_seeds(7, 200, 4096)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_seeds", [1024, 1000])
def test_every_direction_is_as_likely(num_seeds: int) -> None:
    drawn = torch.bincount(uniform_seeds(3, 1_000_000, num_seeds), minlength=num_seeds)
    assert len(drawn) == num_seeds
    assert chisquare(drawn.numpy()).pvalue > 1e-3


def test_walks_of_clients_and_rounds_differ() -> None:
    seeds = [derive(derive(0, "round", n), c) for n in (1, 2) for c in ("a", "b")]
    walks = [uniform_seeds(seed, 200, 4096) for seed in seeds]
    assert all(not torch.equal(a, b) for i, a in enumerate(walks) for b in walks[:i])


def test_scalars_land_on_their_directions() -> None:
    walk, scalars = torch.tensor([2, 0, 2]), torch.tensor([1.5, -1.0, 0.25])
    assert landed(walk, scalars, 4).tolist() == [-1.0, 0.0, 1.75, 0.0]


def test_the_pace_is_the_learning_rate_of_the_move() -> None:
    walk = uniform_seeds(1, 50, 16)
    scalars = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = {COEFFICIENTS: -3e-7 * landed(walk, scalars, 16)}
    assert pace(moved, walk, scalars) == pytest.approx(3e-7, rel=1e-14)
    assert pace({COEFFICIENTS: torch.zeros(16)}, walk, torch.zeros(50)) == 0.0


def test_what_travelled_as_float32_is_trained_in_float64() -> None:
    assert widened({COEFFICIENTS: torch.tensor([0.1])})[COEFFICIENTS].dtype is torch.float64
