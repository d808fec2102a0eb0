"""Ten of the forty and more architectures of the benchmark: each trains as plain PEFT would have it, or is refused."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REFUSED = {"bert": "refused: model.name must be a causal language model, but bert "}
LEFT = {
    "gemma3": "model.vision_tower",
    "phimoe": "model.layers.*.mlp (",
    "llama4": "model.layers.*.feed_forward.experts",
    "jamba": "model.layers.*.mamba.dt_proj",
    "zamba2": "conv1d",
}
pytestmark = [
    pytest.mark.slow,
    # PEFT and transformers warn of their own renamings.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning"),
]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return benchmarks/architectures.py as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("architectures")


def test_the_ten_are_of_the_benchmark(benchmark):
    assert len(set(benchmark.ODD)) == 10
    assert set(benchmark.ODD) <= benchmark.ARCHITECTURES.keys()
    assert len(benchmark.ARCHITECTURES) >= 40


@pytest.mark.parametrize("place", range(10))
def test_an_architecture_trains_or_is_refused_in_a_sentence(benchmark, place: int):
    name = benchmark.ODD[place]
    for kind, outcome in benchmark.outcomes(name).items():
        assert outcome.said.startswith(REFUSED.get(name, "trained: ")), outcome.said
        if kind == "all-linear":
            assert LEFT.get(name, "") in outcome.left_frozen
