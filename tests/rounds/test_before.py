"""A run whose model is not measured before the first round: the same model, and no figure of what it was."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fedloom
from fedloom import experiment
from fedloom.rounds.recipe_settings import Recipe


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the rounds of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(line: dict[str, Any]) -> bool:
    """Return whether a round was measured."""
    return any(name.startswith(("test/", "validation/")) for name in line)


def test_it_is_measured_after_training_alone(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    ends: dict[bool, Any] = {}
    for before in (True, False):
        folder = tmp_path / str(before)
        recipe = small_recipe(
            run={"rounds": 2}, evaluation={"every": 0, "generate": False, "before": before}
        )
        experiment.run(recipe, folder, console=Console(file=io.StringIO()))
        told = (folder / "log.txt").read_text().count("measuring the model before training")
        assert told == before
        ends[before] = json.loads((folder / "summary.json").read_text())
        assert [measured(line) for line in lines(folder)] == [before, False, True]
        assert any(row["round"] == 0 for row in fedloom.open_run(folder).clients) is before
    assert ends[False]["before"] == {}
    assert ends[False]["final"]["test/loss"] == ends[True]["final"]["test/loss"]
    assert ends[False]["state_sha256"] == ends[True]["state_sha256"]


def test_a_metric_that_nobody_measures_is_refused_after_the_first_evaluation(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = small_recipe(
        run={"rounds": 3, "patience": 1, "monitor": "validation/chrf"},
        evaluation={"every": 1, "generate": False, "before": False},
    )
    with pytest.raises(ValueError, match=r"run\.monitor must be one of .*test/loss"):
        experiment.run(recipe, tmp_path, console=Console(file=io.StringIO()))
    assert len(lines(tmp_path)) == 2
