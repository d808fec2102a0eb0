"""What a run in seed space leaves behind of its coefficients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom import experiment
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Recipe]
SEEDS = {
    "tune": {
        "seeds": {"num_seeds": 64, "distribution": "rademacher"},
    },
    "local": {"order": "zeroth", "lr": 1e-4, "steps": None, "batch_size": 2},
    "evaluation": {"every": 0, "generate": False, "max_examples": 2},
    "run": {"rounds": 2, "samples": 0},
}


def left(recipe: Recipe, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the recipe; return the lines of metrics.jsonl and what seeds.json holds."""
    experiment.run(recipe, folder)
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rounds, json.loads((folder / "seeds.json").read_text())


def test_a_run_in_seed_space_tells_its_coefficients(small_recipe: Make, tmp_path: Path) -> None:
    rounds, seeds = left(small_recipe(algorithm={"fedkseed": {"steps": 5}}, **SEEDS), tmp_path)
    (model,) = seeds["models"]
    coefficients = model["coefficients"]
    assert (seeds["num_seeds"], len(coefficients), model["name"]) == (64, 64, "global")
    last = rounds[-1]
    assert sum(c * c for c in coefficients) ** 0.5 == pytest.approx(last["server/coefficient_norm"])
    assert max(map(abs, coefficients)) == pytest.approx(last["server/coefficient_max"])
    walked = sum(c != 0 for c in coefficients) / 64
    assert last["server/walked"] == walked
    assert 5 / 64 <= rounds[1]["server/walked"] < walked, "20 draws of 64 a round, with repeats"
    assert seeds["probabilities"] is None
    assert seeds["rebuild"]["seconds"] >= 0
    assert last["memory/train_bytes"] > 0
    assert last["memory/evaluate_bytes"] > 0
    assert 'id="seeds"' in (tmp_path / "report.html").read_text()


def test_pro_tells_the_chances_of_its_seeds(small_recipe: Make, tmp_path: Path) -> None:
    """Whatever was met, the likeliest seed is e times as likely as the least."""
    recipe = small_recipe(algorithm={"fedkseed": {"steps": 5, "sampling": "pro"}}, **SEEDS)
    rounds, seeds = left(recipe, tmp_path)
    chances = seeds["probabilities"]
    assert sum(chances) == pytest.approx(1)
    assert max(chances) / min(chances) == pytest.approx(2.718282, abs=1e-5)
    assert rounds[1]["server/effective_seeds"] == pytest.approx(64)
    assert "seeds, from the likeliest" in (tmp_path / "report.html").read_text()


def test_plain_averaging_in_seed_space_tells_them_too(small_recipe: Make, tmp_path: Path) -> None:
    rounds, seeds = left(small_recipe(algorithm="fedavg", **SEEDS), tmp_path)
    assert rounds[-1]["server/coefficient_norm"] > 0
    assert len(seeds["models"]) == 1


def test_a_run_in_another_space_tells_nothing_of_it(small_recipe: Make, tmp_path: Path) -> None:
    experiment.run(small_recipe(evaluation={"every": 0}, run={"rounds": 1}), tmp_path)
    assert not (tmp_path / "seeds.json").exists()
    assert "server/walked" not in (tmp_path / "metrics.jsonl").read_text()
