"""Weights of old answers by hand, and settings that are refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedloom.recipe import RecipeError, build_recipe
from fedloom.server.buffering import STALENESS, Buffered, Constant, Hinge, Polynomial
from fedloom.server.samplers import Fixed, Full, Uniform, Weighted, Without

TENSOR = {"w": torch.tensor([2.0])}


def test_the_weights_of_the_papers() -> None:
    weights = [Polynomial().weight(tau) for tau in range(4)]
    assert weights == pytest.approx([1.0, 0.7071, 0.5774, 0.5], abs=5e-5)
    assert [Hinge(10, 4).weight(tau) for tau in (0, 4, 5, 6)] == [1, 1, 1 / 11, 1 / 21]
    assert [Polynomial(2.0).weight(1), Constant().weight(9)] == [0.25, 1.0]
    assert set(STALENESS) == {"polynomial", "hinge", "constant"}


def test_a_fresh_update_is_not_touched_and_whole_models_are_mixed() -> None:
    began, now = {"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}
    mixing = Buffered(1, mixes="models")
    assert mixing.aged(TENSOR, 0, began=began, now=now) is TENSOR
    # FedAsync: w + s (w_i - w), with w_i = 1 + 2 and w = 5.
    assert float(mixing.aged(TENSOR, 1, began=began, now=now)["w"]) == pytest.approx(
        -2 / math.sqrt(2)
    )
    assert float(Buffered(1).aged(TENSOR, 3, began={}, now={})["w"]) == 1.0


def test_who_is_left_out_is_drawn_and_does_not_come() -> None:
    everybody = {f"c{i}": {"num_examples": "4"} for i in range(6)}
    there = {c: p for c, p in everybody.items() if c != "c2"}
    for inner in (Uniform(3), Weighted(3), Full(), Fixed(("c1", "c2"))):
        sampler = Without(inner, {"c2": everybody["c2"]})
        for seed in range(8):
            drawn = list(inner.draw(everybody, seed))
            assert sampler.draw(there, seed) == [c for c in drawn if c != "c2"]
        assert sampler.rate(5) == inner.rate(6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"algorithm": "scaffold"}, "control variates"),
        ({"algorithm": ["clustered", "fedavg"]}, "compared by updates that begin at one model"),
        (
            {"algorithm": [{"private": {"clip": 1.0, "noise_multiplier": 1.0}}, "fedavg"]},
            "epsilon is that of cohorts drawn by chance",
        ),
        ({"algorithm": {"fedavg": {"combine": {"krum": {"attackers": 1}}}}}, "robust rule"),
        ({"algorithm": "fedlora"}, "factors that begin alike"),
        ({"algorithm": ["prune", "fedavg"]}, "mask of the round"),
        ({"algorithm": ["alternate", "fedavg"]}, "by the round"),
        ({"algorithm": ["fedem", "fedavg"]}, "each model of the mixture learns apart"),
        ({"algorithm": ["partial_pooling", "fedavg"]}, "updates that begin at one model"),
        ({"algorithm": "decomfl", "tune": "seeds"}, "seeds of one round"),
        ({"algorithm": {"fedkseed": {"sampling": "pro"}}, "tune": "seeds"}, "chances that every"),
        ({"algorithm": "local"}, "mean of `delta`"),
        ({"cohort": {"poisson": {"q": 0.5}}}, "got poisson"),
        ({"data": {"num_clients": 9}}, "10 different clients, got 9"),
        ({"run": {"mode": "buffered", "min_replies": 11}}, "min_replies 11"),
        (
            {
                "algorithm": ["flasc", "fedavg"],
                "run": {"mode": {"buffered": {"mixes": "models"}}},
            },
            "mixes: updates",
        ),
        ({"run": {"mode": {"buffered": {"size": 0}}}}, "size must be at least 1"),
        ({"run": {"mode": {"buffered": {"max_staleness": -1}}}}, "max_staleness"),
        ({"run": {"mode": {"buffered": {"mixes": "gradients"}}}}, "updates"),
        (
            {"run": {"mode": {"buffered": {"staleness": {"polynomial": {"power": 0}}}}}},
            "power must be a positive",
        ),
        ({"run": {"mode": "asynchronous"}}, "known: synchronous, buffered"),
        ({"clock": {"tiers": {"slow": 2}}}, "tiers of data.tiers (none), got slow"),
        ({"clock": {"seconds": 0}}, "clock.seconds must be a positive"),
        ({"clock": {"spread": 9}}, "clock.spread"),
    ],
)
def test_what_has_to_wait_says_why(change: dict[str, Any], said: str) -> None:
    tree = {"name": "x", "algorithm": "fedavg", "run": {"mode": "buffered"}, **change}
    with pytest.raises(RecipeError) as refusal:
        build_recipe(tree)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": ["flasc", "fedavg"]},
        {"algorithm": ["ditto", {"fedavg": {"server": "adam", "mu": 0.1}}]},
        {"algorithm": ["personal", "fedavg"]},
        {"algorithm": ["freeze", "fedavg"]},
        {"algorithm": "pfedme"},
        {"algorithm": "fedkseed", "tune": "seeds"},
        {"algorithm": ["flasc", {"fedkseed": {"uploads": "delta"}}], "tune": "seeds"},
        {"tune": {"offsite": {}}},
        {"engine": {"flower": {"nodes": 0}}},
    ],
)
def test_what_adds_up_whenever_it_arrives_is_taken(change: dict[str, Any]) -> None:
    tree = {"name": "x", "algorithm": "fedavg", "run": {"mode": "buffered"}, **change}
    assert isinstance(build_recipe(tree).run.mode, Buffered)


def test_what_is_said_of_clients_left_out(small_recipe: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="do not start the site"):
        build_recipe({"name": "x", "data": {"left_out": ["a"]}, "engine": {"flower": {"nodes": 0}}})
    with pytest.raises(RecipeError, match="centralised"):
        small_recipe(data={"left_out": ["client-0"], "pooled": True})
