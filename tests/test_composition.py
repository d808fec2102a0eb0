"""Parts that change how a round goes, two at a time: what the page of concepts says of a pair is what happens."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom import experiment
from fedloom.recipe import RecipeError
from fedloom.rounds.recipe_settings import Recipe

PAGE = Path(__file__).parents[1] / "docs/concepts.md"
PARTS = ("secure", "buffered", "private", "clustered", "flasc", "seeds", "robust", "offsite")
Pair = tuple[str, str]
NEEDS: dict[Pair, dict[str, Any]] = {
    ("secure", "clustered"): {"mode": {"given": {"by": "language"}}, "share": {"pool": "off"}},
    ("secure", "flasc"): {"upload_on": "download"},
    ("secure", "seeds"): {"uploads": "delta"},
    ("private", "seeds"): {"uploads": "delta"},
    ("flasc", "robust"): {"upload": 1},
    ("seeds", "robust"): {"in the place of": "fedkseed"},
    ("robust", "offsite"): {"adapter": {"lora": {"origin": "zero"}}},
}
"""Settings of the second of a pair, or of flasc, where the page says some."""
UNSET: dict[Pair, str] = {
    ("secure", "clustered"): "secure hides single uploads, .* clustered with mode given or random",
    ("secure", "flasc"): "set flasc.upload_on to download",
    ("secure", "seeds"): "fedkseed.uploads must be delta with secure",
    ("private", "seeds"): "reads the mean of uploads, got FedKSeed, which reads each",
    ("flasc", "robust"): "take one share for all of them, or combine: mean",
    ("robust", "offsite"): "which needs tune.lora.origin zero",
}
"""What is said where those settings are left out; fedkseed has no rule to put a robust one in the place of."""
REFUSED: dict[Pair, str] = {
    ("secure", "buffered"): "secure opens sums of a cohort that trains at the same time",
    (
        "secure",
        "robust",
    ): "secure hides single uploads, got fedavg, whose server reads each in full",
    ("buffered", "private"): "run.mode buffered .* got poisson",
    ("buffered", "clustered"): r"run.mode buffered .* got clustered\(fedavg\)",
    ("buffered", "robust"): r"run.mode buffered .* \(a robust rule compares updates",
    (
        "private",
        "clustered",
    ): "private needs an algorithm whose server reads the mean .* got Clustered",
    ("private", "robust"): "private needs an algorithm whose server reads the mean .* got FedAvg",
    ("seeds", "offsite"): "tune must be one of",
}


def says() -> dict[Pair, str]:
    """Return the cells of the page's table."""
    table = PAGE.read_text().split("<!-- pairs:begin -->\n")[1].split("<!-- pairs:end -->")[0]
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    (_, *columns), _, *told = rows
    return {
        (name, column): cell
        for name, *cells in told
        for column, cell in zip(columns, cells, strict=True)
        if cell
    }


def sections_of(pair: Pair) -> dict[str, Any]:
    """Return the sections of a recipe with both parts."""
    needs = NEEDS.get(pair, {})
    lora = {"rank": 2, "targets": ["q_proj", "v_proj"], "origin": "zero"}
    tune: dict[str, Any] = {"lora": lora}
    inner: Any = "fedavg"
    if "robust" in pair:
        inner = {"fedavg": {"combine": "median"}}
    elif "seeds" in pair:
        inner = {"fedkseed": {"steps": 1, **needs}}
    if "seeds" in pair or "offsite" in pair:
        tune = {"seeds": {"num_seeds": 16}} if "seeds" in pair else {}
        tune |= {"offsite": {"left": 1, "right": 0, **needs}} if "offsite" in pair else {}
    layers = {"private": {"clip": 1.0, "noise_multiplier": 1.0}, "clustered": {}, "flasc": {}}
    if set(pair) & layers.keys() and "seeds" not in pair:
        layers[next(name for name in reversed(pair) if name in layers)] |= needs
    mode = {"mode": {"buffered": {"size": 2}}} if "buffered" in pair else {}
    return {
        "algorithm": [*({name: own} for name, own in layers.items() if name in pair), inner],
        "tune": tune,
        "local": {"steps": None if "seeds" in pair and "robust" not in pair else 1},
        "run": {"rounds": 1, "samples": 0, **mode},
        "evaluation": {"every": 0, "generate": False, "validation": False, "max_examples": 1},
        **({"secure": {"threshold": 3}} if "secure" in pair else {}),
        **({"cohort": {"poisson": {"q": 1.0}}} if "private" in pair else {}),
    }


def test_the_page_has_every_pair_and_says_what_it_needs():
    told = says()
    assert {*told} == {*combinations(PARTS, 2)}
    assert {pair for pair, cell in told.items() if cell == "no"} == {*REFUSED}
    assert {pair for pair, cell in told.items() if cell not in ("yes", "no")} == {*NEEDS}
    assert {*UNSET} == {*NEEDS} - {("seeds", "robust")}
    for pair, needs in NEEDS.items():
        assert all(f"{key}" in told[pair] for key in needs if key != "in the place of")


@pytest.mark.parametrize("pair", REFUSED, ids=" and ".join)
def test_what_does_not_go_together_says_why(pair: Pair, small_recipe: Callable[..., Recipe]):
    with pytest.raises((RecipeError, ValueError), match=REFUSED[pair]):
        small_recipe(**sections_of(pair))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [pair for pair in combinations(PARTS, 2) if pair not in REFUSED], ids=" and ".join
)
def test_what_goes_together_trains(pair: Pair, small_recipe: Callable[..., Recipe], tmp_path: Path):
    result = experiment.run(
        small_recipe(**sections_of(pair)), tmp_path, console=Console(quiet=True)
    )
    assert result.metrics[-1]["comm/round_kept"] == 1
    assert result.summary["upload_bytes"] > 0


@pytest.mark.parametrize("pair", UNSET, ids=" and ".join)
def test_without_its_settings_a_pair_is_refused(
    pair: Pair, small_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delitem(NEEDS, pair)
    with pytest.raises((RecipeError, ValueError), match=UNSET[pair]):
        experiment.run(small_recipe(**sections_of(pair)), tmp_path, console=Console(quiet=True))
