"""Canary clients in whole runs: found without noise, hidden by it, and what is asked of the command."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom import experiment
from fedloom.audit.canaries import Canaries, exposure, strings, with_canaries
from fedloom.audit.conduct import audit
from fedloom.audit.findings import Finding
from fedloom.audit.mechanism import Promise
from fedloom.audit.records import Case, open_case
from fedloom.rounds.recipe_settings import Recipe

SMALL = Canaries(canaries=24, length=8)
Make = Callable[..., Recipe]


def recorded(make: Make, home: Path, **sections: Any) -> Case:
    recipe = make(
        audit="record",
        tune={"full": {}},
        local={"optimizer": "adamw", "lr": 0.01, "steps": 20, "batch_size": 4},
        evaluation={"generate": False, "every": 0, "max_examples": 1},
        run={"rounds": 1, "samples": 0},
        **sections,
    )
    return open_case(experiment.run(recipe, home).folder, console=Console(quiet=True))


@pytest.fixture(scope="module")
def plain(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return recorded(small_recipe, tmp_path_factory.mktemp("canaries") / "run")


@pytest.fixture(scope="module")
def private(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Case:
    algorithm = [{"private": {"clip": 0.5, "epsilon": 1.0, "delta": 1e-3}}, "fedavg"]
    home = tmp_path_factory.mktemp("canaries") / "private"
    return recorded(small_recipe, home, algorithm=algorithm, cohort={"poisson": {"q": 1.0}})


def by_measure(found: Sequence[Finding]) -> Mapping[str, Finding]:
    return {one.measure: one for one in found}


@pytest.mark.slow
def test_without_noise_the_model_tells_who_took_part(plain: Case) -> None:
    assert SMALL.silent(plain) is None
    found = by_measure(list(SMALL.findings(plain)))
    assert found["epsilon proved"].value > 0.5
    assert "nothing is promised" in found["epsilon proved"].says
    assert found["AUC of canaries"].value > 0.9
    assert found["exposure, bits"].value > 4
    assert "of 10 that 1023 other strings can show" in found["exposure, bits"].says


@pytest.mark.slow
def test_with_noise_they_are_hidden_and_the_accountant_stands_beside_it(private: Case) -> None:
    found = by_measure(list(SMALL.findings(private)))
    assert found["epsilon proved"].value <= 1
    assert "the accountant says 1.00 at delta 0.001, which stands" in found["epsilon proved"].says
    assert found["exposure, bits"].value < 4


@pytest.mark.slow
def test_the_promise_of_a_private_run_is_examined_with_its_own_settings(
    private: Case, plain: Case
) -> None:
    once, twice = Promise().findings(private)
    assert once.value <= 1
    assert "the accountant says 1.00 at delta 0.001, which stands" in once.says
    assert "at 200 canaries" in once.says
    assert twice.seen == "models, rounds repeated"
    assert "which stands" in twice.says
    assert "no algorithm private" in (Promise().silent(plain) or "")


def test_canaries_count_as_much_as_other_clients_and_keep_their_names_apart(plain: Case) -> None:
    session = plain.session
    own = strings(session, 4, 8, seed=1)
    assert all(len(row.ids) == 8 and row.num_targets == 7 for row in own)
    data = with_canaries(session, own, [True, False, True, True])
    added = sorted(data.shards.keys() - session.federation.shards.keys())
    assert added == ["canary-000", "canary-002", "canary-003"]
    assert list(data.manifest.clients) == sorted(data.manifest.clients)
    rows = sorted(session.counts[client].rows for client in session.learners)
    assert all(rows[0] <= data.manifest.clients[name].rows <= rows[-1] for name in added)
    assert {row.key for row in data.shards["canary-002"].train} == {own[2].key}
    again = with_canaries(replace(session, federation=data), own, [True] * 4)
    assert "canary-000+" in again.shards


def test_exposure_is_the_rank_in_bits() -> None:
    references = [float(i) for i in range(1023)]
    assert exposure(-1.0, references) == 10
    assert exposure(511.5, references) == pytest.approx(math.log2(1024 / 513))
    assert exposure(2000.0, references) == 0


@pytest.mark.slow
def test_training_anew_waits_until_it_is_asked_for_and_says_what_it_takes(
    plain: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = plain.session.folder
    monkeypatch.setattr("fedloom.audit.conduct.ATTACKS", {"promise": Promise(), "canary": SMALL})
    found = audit(folder)
    assert found.silent["canary"] == "it takes longer, so ask for it with --attack canary"
    assert not found.findings
    assert (
        "1 round is trained anew with about 12 clients more, so that 16 train in a round"
        in SMALL.cost(plain)
    )
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    audit(folder, ["canary"])
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_runs_in_which_no_string_is_learnt_are_passed_over(plain: Case) -> None:
    recipe = replace(plain.recipe, objects={"model": "mine"})
    silent = SMALL.silent(replace(plain, session=replace(plain.session, recipe=recipe)))
    assert silent == "its model or trainer was given from Python, and training anew needs them"


@pytest.mark.parametrize(
    ("settings", "sections", "words"),
    [
        (
            {"noise": "distributed", "delta": 0.1},
            {"secure": {"threshold": 3, "clip": 2.0}},
            "clients add it within secure sums",
        ),
        ({"delta": 0.3}, {}, "one to too few clients to examine it by"),
    ],
)
def test_promises_that_canaries_alone_cannot_examine_are_passed_over(
    plain: Case,
    small_recipe: Make,
    settings: Mapping[str, Any],
    sections: Mapping[str, Any],
    words: str,
) -> None:
    algorithm = [{"private": {"clip": 0.25, "noise_multiplier": 1.0, **settings}}, "fedavg"]
    recipe = small_recipe(algorithm=algorithm, cohort={"poisson": {"q": 1.0}}, **sections)
    case = replace(plain, session=replace(plain.session, recipe=recipe))
    assert words in (Promise().silent(case) or "")
