"""Whole runs that learn preferences, and what one does with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedloom
from fedloom.cli import app
from fedloom.core.metrics import checked
from fedloom.recipe import load_recipe
from fedloom.results.plan import make_plan

pytestmark = pytest.mark.slow

SMALL = [
    "data.num_examples=60",
    "data.num_clients=3",
    "data.partition=iid",
    "data.where={language: [en], task: [capital, plural]}",
    "tune.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj]}",
    "local={steps: 2, batch_size: 4, lr: 0.004, schedule: constant}",
    "evaluation={every: 1, max_examples: 3}",
    "run={rounds: 2, baselines: [], samples: 0}",
]
MEASURED = {"loss", "preference_accuracy", "preference_margin", "length_ratio"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fedloom.run(load_recipe("dpo", SMALL), tmp_path_factory.mktemp("dpo") / "run")


def test_a_run_measures_preferences_from_zero(finished: Any) -> None:
    before, final = finished.summary["before"], finished.summary["final"]
    assert before["test/preference_margin"] == before["test/reference_kl"] == 0.0
    assert before["test/preference_accuracy"] == 0.5
    assert {f"test/{name}" for name in MEASURED} <= final.keys()
    assert final["test/reference_kl"] > 0
    assert "test/perplexity" not in final
    assert "test/token_accuracy" not in final


def test_its_report_and_table_name_what_was_measured(finished: Any) -> None:
    html = (finished.folder / "report.html").read_text()
    assert "preference accuracy" in html
    assert "preference margin" in html
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    assert "pair" in next(iter(manifest["losses"]["formats"]))


def test_its_model_answers_in_a_chat(finished: Any) -> None:
    assert isinstance(finished.chat().answer("What is the capital of France?"), str)


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_data_shows_both_answers(recipe: str) -> None:
    shown = CliRunner().invoke(app, ["data", recipe, *SMALL])
    assert shown.exit_code == 0, shown.output
    assert ": chosen" in shown.output
    assert ": rejected" in shown.output


def test_a_plan_counts_pairs_as_they_are_trained_and_measured(tmp_path: Path) -> None:
    recipe = load_recipe("dpo", [*SMALL, "run.rounds=1"])
    plan = make_plan(recipe)
    summary = fedloom.run(recipe, tmp_path / "run").summary
    sent = summary["upload_bytes"] + summary["download_bytes"]
    assert plan.total_bytes == pytest.approx(sent, rel=0.02)
    assert plan.train_seconds > 0 < plan.evaluate_seconds


def test_losses_may_be_below_zero_where_they_are_corrected_for_wrong_labels() -> None:
    plain = load_recipe("dpo")
    robust = load_recipe("dpo", ["objective={dpo: {loss: robust, label_smoothing: 0.1}}"])
    assert checked({"loss": -0.5}, measured=False, table=robust.metrics) == {"loss": -0.5}
    with pytest.raises(ValueError, match=r"loss must be in \[0, 1e\+06\]"):
        checked({"loss": -0.5}, measured=False, table=plain.metrics)


@pytest.mark.slow
def test_orpo_and_kto_run_without_and_with_a_divergence(tmp_path: Path) -> None:
    for name, reference in (("orpo", False), ("kto", True)):
        recipe = load_recipe("dpo", [*SMALL, f"objective={name}", "run.rounds=1"])
        final = fedloom.run(recipe, tmp_path / name).summary["final"]
        assert final.keys() >= {f"test/{each}" for each in MEASURED}
        assert ("test/reference_kl" in final) is reference
