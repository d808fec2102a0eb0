"""The recipes for real text learn it: GSM8K (by FLASC), CodeAlpaca and XQuAD on the bundled model."""

import os
from pathlib import Path

import pytest

from fedloom import experiment
from fedloom.recipe import load_recipe

BESIDE = Path(__file__).parents[2].parent / "shared" / "data"
SMALLER = (
    # A tenth of the recipe's work: the fall is asked for, not the best model.
    "local.steps=3",
    "data.max_length=160",
    "data.truncate=prompt",
    "local.batch_size=2",
    "evaluation.every=0",
    "evaluation.generate=false",
    "evaluation.max_examples=12",
    "run.samples=0",
)


@pytest.mark.slow
@pytest.mark.realtext
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("flasc_gsm8k", "gsm8k/train.jsonl"),
        ("codealpaca", "codealpaca/train.json"),
        ("xquad", "xquad"),
    ],
)
def test_held_out_loss_falls_by_fifteen_percent_in_twenty_rounds(
    name: str, source: str, tmp_path: Path
) -> None:
    path = Path(os.environ.get("FEDLOOM_DATA", BESIDE)) / source
    if not path.exists():
        pytest.skip("no real text beside the repository; FEDLOOM_DATA names its folder")
    recipe = load_recipe(name, [*SMALLER, f"data.source={path}"])
    assert recipe.run.rounds == 20
    summary = experiment.run(recipe, tmp_path).summary
    assert summary["rounds"] == 20
    fall = 1 - summary["final"]["test/loss"] / summary["before"]["test/loss"]
    assert fall >= 0.15
    assert summary["num_clients"] == 8
