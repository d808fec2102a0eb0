"""FedEx with real trainers: a planted learning rate, and the page of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom


@pytest.mark.slow
def test_the_planted_learning_rate_is_found_on_the_bundled_model(tmp_path: Path) -> None:
    """Of a thousandth, once and a hundred times a good rate; by the last the shared model is worse for a while, too."""
    arms = "{arms: [{lr: 0.001}, {lr: 1.0}, {lr: 100.0}]}"
    settings = [
        f"algorithm=[{{fedex: {arms}}}, fedavg]",
        "data.num_examples=240",
        "data.num_clients=6",
        "local={optimizer: adamw, lr: 0.01, steps: 2, batch_size: 4}",
        "evaluation={every: 0, generate: false}",
        "run={rounds: 10, samples: 0}",
    ]
    with fedloom.session("quickstart", tmp_path / "run", overrides=settings) as going:
        told = [finished.metrics for finished in going.rounds()]
    assert told[-1]["server/arm_2"] > 0.8
    assert told[-1]["server/arm_entropy"] < told[0]["server/arm_entropy"]


def test_the_page_shows_the_chances_of_each_tier(
    small_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = small_recipe(
        algorithm=[
            {"fedex": {"arms": [{"lr": 0.1}, {"lr": 2.0, "steps": 1}], "by_tier": True}},
            "fedavg",
        ],
        data={"tiers": {"phone": 0.5, "desk": 0.5}},
        evaluation={"generate": False},
        run={"rounds": 2, "samples": 0},
    )
    result = fedloom.run(recipe, tmp_path / "run")
    page = result.report.read_text()
    assert "Chance of each arm, tier phone" in page
    assert "Chance of each arm, tier desk" in page
    assert "lr x0.1" in page
    assert "lr x2, 1 steps" in page
    chances = [result.metrics[-1][f"server/desk/arm_{k}"] for k in (1, 2)]
    assert sum(chances) == pytest.approx(1.0)
