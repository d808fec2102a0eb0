"""What is not a number is no result: never the best, never an improvement, and shown as what it is."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedloom import experiment
from fedloom.models import build
from fedloom.report.compare import compare
from fedloom.rounds.recipe_settings import Recipe
from fedloom.tracking.metrics_log import MetricsLog

LOSS = "validation/loss"


def history(*losses: float) -> MetricsLog:
    return MetricsLog([{"round": at, LOSS: loss} for at, loss in enumerate(losses)])


def test_the_best_is_a_number() -> None:
    assert history(2.0, math.nan, 1.0, math.inf).best(LOSS) == (2, 1.0)
    assert history(math.nan, 3.0).best(LOSS) == (1, 3.0)
    best = history(math.nan, math.nan).best(LOSS)
    assert best is not None
    assert best[0] == 0
    assert math.isnan(best[1])


def test_the_ends_are_what_they_are() -> None:
    before, after = history(2.0, 1.0, math.nan).ends(LOSS)
    assert before == 2
    assert after is not None
    assert math.isnan(after)
    assert history(2.0, 1.0, math.nan).of(LOSS) == [(0, 2.0), (1, 1.0)]


def test_a_run_without_numbers_stops_early() -> None:
    assert not history(2.0, math.nan).should_stop(LOSS, 2)
    assert history(2.0, math.nan, math.nan).should_stop(LOSS, 2)
    assert history(math.nan, math.nan, math.nan).should_stop(LOSS, 2)
    assert not history(math.nan, math.nan, 5.0).should_stop(LOSS, 2)
    assert history(2.0, math.nan, math.nan).total(LOSS) == 2


def strict(text: str) -> Any:
    """Read JSON as the standard has it, which knows no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_run_of_a_broken_model_has_valid_files_and_says_so(
    small_recipe: Callable[..., Recipe],
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A model that is broken from the start is refused; this one has to pass for one that breaks later.
    monkeypatch.setattr(build, "check_causal", lambda *_: None)
    model = tiny_llama(vocab=len(tiny_tokenizer))
    torch.nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, torch.nan)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    recipe = small_recipe(
        evaluation={"every": 1, "by": "language"},
        run={"rounds": 3, "patience": 1, "baselines": ["local"]},
    )
    recipe = replace(recipe, model=replace(recipe.model, name=str(tmp_path / "model")))
    folder = tmp_path / "run"
    result = experiment.run(recipe, folder)
    assert result.summary["rounds"] == 1, "nothing got better"
    assert result.summary["final"]["test/exact_match"] == 0
    assert result.summary["final"]["test/token_accuracy"] == 0
    for file in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        for line in (
            file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        ):
            strict(line)
    summary = strict((folder / "summary.json").read_text())
    assert summary["final"]["test/loss"] is None
    assert summary["best"]["test/loss"] == {"round": 0, "value": None}
    assert {each["after"] for each in strict((folder / "samples.json").read_text())} == {""}
    console = Console(width=120, record=True, file=StringIO())
    console.print(result.table())
    console.print(
        compare([folder, folder / "baselines/local"], out=tmp_path / "c.html", metric="test/loss")
    )
    assert console.export_text().count("not finite") >= 4
    report = (folder / "report.html").read_text()
    assert "not finite" in report
    assert "the model gave no numbers" in report
