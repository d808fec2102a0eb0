"""Where there are many clients, an evaluation measures some of them, drawn by the run's seed and the round."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom import experiment
from fedloom.cli_console import show_outcome
from fedloom.result import Result
from fedloom.results.evaluate import evaluate
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import build

Make = Callable[..., Recipe]


def measured(folder: Path, split: str = "test") -> dict[int, set[str]]:
    """Return who was measured after each round."""
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    found: dict[int, set[str]] = {}
    for row in rows:
        if row["split"] == split:
            found.setdefault(row["round"], set()).add(row["client"])
    return found


def recipe(small_recipe: Make, rounds: int = 3, **changes: Any) -> Recipe:
    evaluation = {"every": 1, "clients": 2, "generate": False, **changes.pop("evaluation", {})}
    return small_recipe(
        data={"num_examples": 160, "num_clients": 8},
        evaluation=evaluation,
        run={"rounds": rounds, "samples": 0, **changes.pop("run", {})},
        **changes,
    )


@pytest.fixture(scope="module")
def done(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "run"
    drawn = recipe(small_recipe, evaluation={"by": "task"}, run={"baselines": ["local"]})
    experiment.run(drawn, folder)
    return folder


def test_each_evaluation_measures_as_many_and_others(done: Path) -> None:
    found = measured(done)
    assert [len(found[number]) for number in range(4)] == [2] * 4
    assert len(set.union(*found.values())) > 2
    assert measured(done, "validation") == found


def test_baselines_measure_the_same_clients(done: Path) -> None:
    assert measured(done / "baselines" / "local") == measured(done)


def test_how_many_of_how_many_is_said(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert summary["evaluated"] == {"clients": 2, "of": 8}
    page = (done / "report.html").read_text()
    assert "Each evaluation measured 2 of the 8 clients with test data, drawn anew." in page
    out = StringIO()
    show_outcome(Result(done), console=Console(file=out, width=120))
    assert "2 of 8, drawn for each evaluation" in out.getvalue()


def test_results_by_label_are_those_of_the_last_round(done: Path) -> None:
    own = json.loads((done / "by_label.json").read_text())["own"]
    last = json.loads((done / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(m["num_examples"] for m in own.values()) == last["test/num_examples"]


def test_all_clients_are_measured_when_a_run_is_evaluated_again(
    done: Path, small_recipe: Make
) -> None:
    session = build(recipe(small_recipe), done)
    assert len(evaluate(session, last_run(session)).clients) == 8


def test_a_resumed_run_draws_as_one_that_was_never_stopped(
    small_recipe: Make, tmp_path: Path, done: Path
) -> None:
    experiment.run(recipe(small_recipe, 1, evaluation={"by": "task"}), tmp_path)
    experiment.run(recipe(small_recipe, 3, evaluation={"by": "task"}), tmp_path)
    assert measured(tmp_path) == measured(done)
    for file in ("clients.jsonl", "by_label.json"):
        assert (tmp_path / file).read_bytes() == (done / file).read_bytes()


def test_as_many_as_there_are_is_all(small_recipe: Make, tmp_path: Path) -> None:
    for name, clients in (("all", None), ("more", 9)):
        drawn = recipe(small_recipe, 1, evaluation={"clients": clients})
        summary = experiment.run(drawn, tmp_path / name).summary
        assert "evaluated" not in summary
    assert "drawn anew" not in (tmp_path / "more" / "report.html").read_text()
    one, other = ((tmp_path / name / "clients.jsonl").read_bytes() for name in ("all", "more"))
    assert one == other
