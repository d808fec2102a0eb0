import math
import pickle
from collections import Counter
from itertools import permutations
from typing import Any

import pytest

from fedloom.core.protocols import Profile
from fedloom.server.samplers import (
    SAMPLERS,
    Fixed,
    Full,
    Poisson,
    Sampler,
    Uniform,
    Weighted,
)

POPULATION: dict[str, Profile] = {f"c{i}": {"num_examples": str(i + 1)} for i in range(6)}
EVERY = [Uniform(3), Fixed(("c4", "c1")), Weighted(3), Full(), Poisson(0.4)]
DRAWS = 4000


def shares(sampler: Sampler) -> dict[str, float]:
    counts = Counter(c for seed in range(DRAWS) for c in sampler.draw(POPULATION, seed))
    return {client: counts[client] / DRAWS for client in POPULATION}


def error(share: float) -> float:
    """Return five standard deviations of a share over the draws."""
    return 5 * math.sqrt(share * (1 - share) / DRAWS)


@pytest.mark.parametrize("sampler", EVERY, ids=SAMPLERS)
def test_a_draw_is_a_function_of_the_clients_and_the_seed(sampler: Sampler) -> None:
    shuffled = {c: POPULATION[c] for c in ("c3", "c0", "c5", "c1", "c4", "c2")}
    for seed in range(20):
        cohort = list(sampler.draw(POPULATION, seed))
        assert cohort == sorted(set(cohort))
        assert cohort == list(sampler.draw(shuffled, seed))
        assert cohort == list(sampler.draw(POPULATION, seed))


@pytest.mark.parametrize("sampler", EVERY, ids=SAMPLERS)
def test_the_mean_cohort_is_the_promised_share(sampler: Sampler) -> None:
    assert sum(shares(sampler).values()) / 6 == pytest.approx(sampler.rate(6), abs=error(0.4))


def test_uniform_draws_its_size_and_favours_nobody() -> None:
    assert {len(Uniform(2).draw(POPULATION, seed)) for seed in range(50)} == {2}
    for share in shares(Uniform(2)).values():
        assert share == pytest.approx(1 / 3, abs=error(1 / 3))


def test_poisson_decides_on_each_client_alone_and_may_draw_nobody() -> None:
    sizes = Counter(len(Poisson(0.3).draw(POPULATION, seed)) for seed in range(DRAWS))
    for size in range(7):
        binomial = math.comb(6, size) * 0.3**size * 0.7 ** (6 - size)
        assert sizes[size] / DRAWS == pytest.approx(binomial, abs=error(binomial))
    assert sizes[0] > 0
    assert Poisson(1.0).draw(POPULATION, 7) == list(POPULATION)


def test_weighted_draws_one_client_in_proportion_to_its_weight() -> None:
    for client, share in shares(Weighted(1)).items():
        expected = int(POPULATION[client]["num_examples"]) / 21
        assert share == pytest.approx(expected, abs=error(expected))


def test_weighted_draws_the_next_in_proportion_to_what_is_left() -> None:
    weights = {c: float(p["num_examples"]) for c, p in POPULATION.items()}
    total = sum(weights.values())
    expected = dict.fromkeys(POPULATION, 0.0)
    for first, second in permutations(POPULATION, 2):
        chance = weights[first] / total * weights[second] / (total - weights[first])
        expected[first] += chance
        expected[second] += chance
    for client, share in shares(Weighted(2)).items():
        assert share == pytest.approx(expected[client], abs=error(expected[client]))


def test_weighted_survives_weights_far_apart() -> None:
    population = {"big": {"w": "1e9"}, "small": {"w": "1e-9"}, "other": {"w": "1"}}
    for seed in range(50):
        assert Weighted(2, by="w").draw(population, seed) == ["big", "other"]
        assert len(Weighted(3, by="w").draw(population, seed)) == 3


def test_fixed_is_always_the_same() -> None:
    assert all(Fixed(("c4", "c1")).draw(POPULATION, seed) == ["c1", "c4"] for seed in range(5))
    assert Fixed(("c4", "c1")).rate(6) == 1 / 3


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Uniform(0), "cohort.uniform.size must be at least 1, got 0"),
        (
            lambda: Uniform(7).draw(POPULATION, 0),
            "cohort.uniform.size must be at most the 6 reachable clients, got 7",
        ),
        (
            lambda: Uniform(7).rate(6),
            "cohort.uniform.size must be at most the 6 reachable clients, got 7",
        ),
        (lambda: Weighted(-1), "cohort.weighted.size must be at least 1, got -1"),
        (
            lambda: Weighted(7).draw(POPULATION, 0),
            "cohort.weighted.size must be at most the 6 reachable clients, got 7",
        ),
        (
            lambda: Weighted(1, by="speed").draw(POPULATION, 0),
            (
                "cohort.weighted.by must be in every client's profile,"
                " got 'speed' while c0 has num_examples"
            ),
        ),
        (
            lambda: Weighted(1).draw({"c": {}}, 0),
            (
                "cohort.weighted.by must be in every client's profile,"
                " got 'num_examples' while c has nothing"
            ),
        ),
        (
            lambda: Weighted(1, by="tier").draw({"c": {"tier": "phone"}}, 0),
            "cohort.weighted.by must name a positive number, got 'phone' as 'tier' of c",
        ),
        (
            lambda: Weighted(1).draw({"c": {"num_examples": "0"}}, 0),
            "cohort.weighted.by must name a positive number, got '0' as 'num_examples' of c",
        ),
        (lambda: Fixed(()), "cohort.fixed.clients must name at least one client, got none"),
        (lambda: Fixed(("a", "b", "a")), "cohort.fixed.clients must name a client once, got 'a'"),
        (
            lambda: Fixed(("c1", "nobody")).draw(POPULATION, 0),
            (
                "cohort.fixed.clients must be among the reachable clients"
                " (6, first c0, c1, c2, c3, c4), got 'nobody'"
            ),
        ),
        (
            lambda: Fixed(("a", "b")).rate(1),
            "cohort.fixed.clients must be at most the 1 reachable clients, got 2",
        ),
        (lambda: Poisson(0), "cohort.poisson.q must be in (0, 1], got 0"),
        (lambda: Poisson(1.5), "cohort.poisson.q must be in (0, 1], got 1.5"),
    ],
)
def test_misuse_is_one_sentence_that_says_where(act: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # the whole sentence is compared below
        act()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("sampler", EVERY, ids=SAMPLERS)
def test_samplers_hold_no_state_and_travel(sampler: Any) -> None:
    assert pickle.loads(pickle.dumps(sampler)) == sampler
    with pytest.raises((AttributeError, TypeError)):
        sampler.cache = 1
