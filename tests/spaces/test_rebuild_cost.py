"""Which distribution fits a model's size, and what a rebuild takes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.models.build import Base, ModelSettings
from fedloom.models.quantized import quantize_
from fedloom.models.schemes import SCHEMES
from fedloom.spaces.rebuild_cost import fitting_distribution, rebuild_seconds
from fedloom.spaces.seed_space import Seeds


@pytest.mark.parametrize(
    ("num_weights", "num_seeds", "expected"),
    [
        (4_000_000, 4096, "gaussian"),
        (134_515_008, 4096, "rademacher"),
        (134_515_008, 64, "gaussian"),
        (268_098_176, 4096, "lowrank"),
        (3_000_000_000, 256, "rademacher"),
        (3_000_000_000, 4096, "lowrank"),
    ],
)
def test_the_distribution_follows_from_the_sizes(
    num_weights: int, num_seeds: int, expected: str
) -> None:
    assert fitting_distribution(num_weights, num_seeds) == expected
    seeds = Seeds(num_seeds=num_seeds)
    assert seeds.drawn_from(num_weights, quantized=False) == expected
    assert seeds.drawn_from(num_weights, quantized=True) == "lowrank"
    asked = Seeds(num_seeds=num_seeds, distribution="popcount")
    assert asked.drawn_from(num_weights, quantized=False) == "popcount"


def test_what_was_chosen_is_what_both_sides_compare(tiny_llama: Callable[..., Any]) -> None:
    def space(tune: Seeds, *, quantized: bool = False) -> Any:
        base: Any = Base(tiny_llama().requires_grad_(False), None, "random")
        if quantized:
            quantize_(base.model, SCHEMES["int8"])
        return tune.make_space(base, seed=1)

    auto = space(Seeds(num_seeds=16))
    assert auto.directions.distribution == "gaussian"
    assert auto.identity() == space(Seeds(num_seeds=16, distribution="gaussian")).identity()
    assert space(Seeds(num_seeds=16), quantized=True).identity()["distribution"] == "lowrank 1"


def test_a_rebuild_is_said_with_its_distribution_before_a_weight_is_read() -> None:
    told = Seeds(num_seeds=64).rebuild_cost(ModelSettings())
    assert re.fullmatch(r"64 gaussian directions: [\d.e-]+ s, once for all who share .*", told)
    told = Seeds(num_seeds=64).rebuild_cost(ModelSettings(quantize="int8"))
    assert told.startswith("64 lowrank directions: ")
    with pytest.raises(ValueError, match=r"tune.seeds.weights .* no tensor has norms"):
        Seeds(weights=["norms"]).rebuild_cost(ModelSettings())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "popcount", "lowrank"])
def test_the_cost_grows_with_weights_and_seeds(distribution: Any) -> None:
    once = rebuild_seconds(distribution, 10**6, 64)
    assert 0 < once < 5
    assert rebuild_seconds(distribution, 10**10, 64) > 100 * once


@pytest.mark.slow
@pytest.mark.realmodel
@pytest.mark.parametrize(
    ("file", "expected"), [("smollm2.gguf", "rademacher"), ("gemma3-270m.gguf", "lowrank")]
)
def test_pools_of_real_models_are_cheap_to_rebuild(
    real_model: Callable[[str], Path], file: str, expected: str
) -> None:
    told = Seeds().rebuild_cost(ModelSettings(name=str(real_model(file))))
    assert told.startswith(f"4,096 {expected} directions: ")
