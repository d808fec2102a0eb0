"""A metric of a user's own in whole runs: its direction decides what is best, when to stop and what pages say."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom import experiment
from fedloom.cli_console import show_outcome
from fedloom.core.metrics import Better, Metric
from fedloom.recipe import RecipeError, build_recipe
from fedloom.recipe_text import to_tree, to_yaml
from fedloom.report.card import model_card
from fedloom.report.compare import compare
from fedloom.report.run_folder import read_results
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Recipe]
USUAL = ("exact_match", "rouge1", "rougeL", "chrf")


class Falling:
    """Scores each answer lower than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, answer: str, references: Sequence[str]) -> float:
        self.calls += 1
        return 1 / self.calls


def vowels(answer: str, references: Sequence[str]) -> float:
    return float(sum(letter in "aeiou" for letter in answer + references[0]))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def text_of(*shown: Any) -> str:
    console = Console(width=160, record=True, file=StringIO())
    for each in shown:
        console.print(each)
    return console.export_text()


def falling(small_recipe: Make, better: Better) -> Recipe:
    metric = Metric("error_rate", "rate of errors", "%", better=better, score=Falling())
    return small_recipe(
        evaluation={"every": 1, "metrics": [*USUAL, metric], "max_examples": 2},
        run={"rounds": 3, "patience": 1, "monitor": "test/error_rate", "samples": 0},
    )


def test_a_falling_error_rate_gets_better_to_the_last_round(
    small_recipe: Make, tmp_path: Path
) -> None:
    summary = experiment.run(falling(small_recipe, "lower"), tmp_path).summary
    assert summary["rounds"] == 3
    assert not summary["stopped_early"]
    best = summary["best"]["test/error_rate"]
    assert best == {"round": 3, "value": summary["final"]["test/error_rate"]}
    rates = [line["test/error_rate"] for line in lines(tmp_path / "metrics.jsonl")]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 4


def test_of_a_rate_that_should_rise_the_same_run_stops_early(
    small_recipe: Make, tmp_path: Path
) -> None:
    summary = experiment.run(falling(small_recipe, "higher"), tmp_path).summary
    assert summary["rounds"] == 1
    assert summary["best"]["test/error_rate"]["round"] == 0


def test_pages_and_tables_call_it_as_it_is_declared(
    small_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = falling(small_recipe, "lower")
    evaluation = dataclasses.replace(recipe.evaluation, by="task")
    run = dataclasses.replace(recipe.run, baselines=("local",))
    recipe = dataclasses.replace(recipe, evaluation=evaluation, run=run)
    result = experiment.run(recipe, tmp_path / "run")
    show_outcome(result, console=Console(width=160))
    shown = capsys.readouterr().out
    assert "Test rate of errors" in shown
    assert "Worst rate of errors" in shown
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Test rate of errors over the rounds" in report
    assert "Rate of errors (lower is better)" in report
    own = json.loads((tmp_path / "run" / "by_label.json").read_text())
    values = {value: metrics["error_rate"] for value, metrics in own["own"].items()}
    assert own["worst"]["error_rate"]["result"] == max(values.values())
    folders = [tmp_path / "run", tmp_path / "run" / "baselines" / "local"]
    table = compare(folders, metric="test/error_rate", out=tmp_path / "c.html")
    best = [
        f"{100 * s['best']['test/error_rate']['value']:.1f} %"
        for s in (result.summary, result.baselines["local"].summary)
    ]
    told = text_of(table) + (tmp_path / "c.html").read_text()
    assert all(value in told for value in best)
    client = next(iter(read_results(folders[0]).manifest["clients"]))
    assert "| Test rate of errors |" in model_card(folders[0], adapter="a", clients=[client])


def test_runs_that_differ_in_what_is_better_are_not_compared(
    small_recipe: Make, tmp_path: Path
) -> None:
    for better in ("lower", "higher"):
        experiment.run(falling(small_recipe, better), tmp_path / better)
    with pytest.raises(ValueError, match=r"do not agree on what is better of test/error_rate \(hi"):
        compare([tmp_path / "lower", tmp_path / "higher"], metric="test/error_rate")


@pytest.mark.parametrize("engine", ["inprocess", "loopback"])
def test_a_sum_over_clients_is_the_sum_of_their_lines_on_any_engine(
    small_recipe: Make, tmp_path: Path, engine: str
) -> None:
    metrics = [
        Metric("vowels", reduce="sum", score=vowels),
        Metric("vowels_each", reduce="mean", score=vowels),
    ]
    recipe = small_recipe(evaluation={"metrics": metrics}, run={"rounds": 1}, engine=engine)
    experiment.run(recipe, tmp_path)
    clients = [row for row in lines(tmp_path / "clients.jsonl") if row["split"] == "test"]
    for line in lines(tmp_path / "metrics.jsonl"):
        mine = [row["metrics"] for row in clients if row["round"] == line["round"]]
        assert line["test/vowels"] == sum(m["vowels"] for m in mine) > 0
        each = [m["vowels"] / m["num_examples"] for m in mine]
        assert line["test/vowels_each"] == pytest.approx(sum(each) / len(each))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "test/vowels" in summary["final"]
    assert "test/vowels" not in summary["best"], "neither way is better"
    assert "better" not in text_of(compare([tmp_path], metric="test/vowels"))


def test_a_run_goes_on_with_the_same_metrics_only(small_recipe: Make, tmp_path: Path) -> None:
    def recipe(rounds: int, better: Better = "lower") -> Recipe:
        metrics = [Metric("vowels", better=better, score=vowels), Metric("drift")]
        return small_recipe(evaluation={"metrics": metrics, "every": 1}, run={"rounds": rounds})

    whole = experiment.run(recipe(3), tmp_path / "whole").summary
    experiment.run(recipe(1), tmp_path / "parts")
    resumed = experiment.run(recipe(3), tmp_path / "parts").summary
    for key in ("state_sha256", "best", "final"):
        assert resumed[key] == whole[key]
    with pytest.raises(ValueError, match=r'evaluation\.metrics\.vowels\.better was "lower" and is'):
        experiment.run(recipe(4, "higher"), tmp_path / "parts")
    with pytest.raises(ValueError, match=r"evaluation\.metrics\.drift was "):
        experiment.run(
            small_recipe(evaluation={"every": 1}, run={"rounds": 4}),
            tmp_path / "parts",
        )


@pytest.mark.parametrize("name", ["vowels", "num_examples"])
def test_early_stopping_needs_a_direction(small_recipe: Make, name: str) -> None:
    with pytest.raises(
        RecipeError,
        match=f"run.monitor is test/{name}, of which neither way is better, .* say better: lower",
    ):
        small_recipe(
            evaluation={"metrics": [*USUAL, Metric("vowels", score=vowels)]},
            run={"patience": 1, "monitor": f"test/{name}"},
        )


def test_a_recipe_may_declare_what_an_algorithm_reports(tiny_folder: Path) -> None:
    listed = ["chrf", {"drift": {"better": "lower", "title": "drift of the heads"}}]
    tree = {"name": "r", "algorithm": "fedavg", "evaluation": {"metrics": listed}}
    recipe = build_recipe(tree)
    assert recipe.evaluation.own == (Metric("drift", "drift of the heads", better="lower"),)
    assert to_tree(recipe)["evaluation"]["metrics"] == [
        "chrf",
        {"drift": {"title": "drift of the heads", "better": "lower"}},
    ]
    assert build_recipe(to_tree(recipe)) == recipe


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("chrf", r"evaluation\.metrics must be a list of names and \{name: settings\}, got 'chrf'"),
        ([3], r"evaluation\.metrics must hold names and \{name: settings\}, got 3"),
        ([{"m": {"direction": "lower"}}], r"unknown key 'direction' in `evaluation\.metrics\.m`"),
        ([{"m": {"better": "less"}}], r"evaluation\.metrics\.m\.better: input should be 'lower'"),
        (
            [{"m": {"score": "mine:f"}}],
            r"evaluation\.metrics\.m\.score: .*mine",
        ),
    ],
)
def test_a_wrong_list_of_metrics_is_refused(listed: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({"name": "r", "evaluation": {"metrics": listed}})


def test_the_function_of_a_metric_is_named_in_the_recipe_of_a_run(small_recipe: Make) -> None:
    text = to_yaml(
        small_recipe(
            evaluation={
                "metrics": [Metric("v", score=vowels), Metric("f", score=Falling())],
            }
        )
    )
    assert f"score: {vowels.__module__}:vowels" in text
    assert f"score: {Falling.__module__}:Falling" in text
