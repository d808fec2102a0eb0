"""Who was learnt from: found where a model learnt by heart, at chance where nothing was, and blind where rows tell nothing."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch

from fedloom import experiment
from fedloom.audit.blind import blind_scores
from fedloom.audit.membership import SCORES, Membership, record_scores, shifted
from fedloom.audit.records import Case
from fedloom.audit.scores import Interval, auc, separation
from fedloom.data.tokens import Example
from fedloom.rounds.recipe_settings import Recipe

LETTERS = "abcdefghijklmnop"


def rows(count: int, seed: int) -> list[dict[str, str]]:
    draws = Random(seed)

    def text(length: int) -> str:
        return "".join(draws.choice(LETTERS) for _ in range(length))

    return [{"prompt": text(6), "completion": text(10)} for _ in range(count)]


@pytest.fixture(scope="module")
def case(small_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a run in which four clients learn 16 random rows each by heart, in 50 epochs; 256 rows nobody learns."""
    recipe = small_recipe(
        audit="record",
        tune={"full": {}},
        local={"optimizer": "adamw", "lr": 0.01, "epochs": 50, "steps": None, "batch_size": 16},
        evaluation={"generate": False, "every": 0, "max_examples": 1},
        run={"rounds": 1, "samples": 0},
    )
    home = tmp_path_factory.mktemp("membership") / "run"
    data = {f"c{i}": {"train": rows(16, i), "test": rows(64, 100 + i)} for i in range(4)}
    opened = experiment.run(recipe, home, data=data).open("audit", data=True)
    return Case(opened.session, opened.run, [1], seed=3)


def scores(case: Case, members: list[Example], others: list[Example]) -> dict[str, float]:
    """Return the area by score for two groups of rows, from the first client's upload."""
    one = next(case.uploads())
    found = record_scores(
        case.session, one.download["params"], case.delta(one), [*members, *others]
    )
    return {name: auc(v[: len(members)], v[len(members) :]) for name, v in found.items()}


def test_rows_learnt_by_heart_are_found_in_every_upload(case: Case) -> None:
    assert Membership().silent(case) is None
    found = {(one.seen, one.measure): one for one in Membership().findings(case)}
    for name in ("loss", "loss drop", "loss ratio"):
        learnt = found["upload", f"AUC of {name}"]
        assert learnt.value > 0.9
        assert learnt.interval is not None
        assert learnt.interval[0] > 0.85
    assert {name for _, name in found if name.startswith("AUC")} == {
        *(f"AUC of {name}" for name in SCORES),
        "AUC of a blind baseline",
    }
    caught = found["upload", "true positives of loss at 1 % false"]
    assert caught.value > 0.5
    assert "of 64 rows learnt from are found, where 0 of 64 that nobody learns" in caught.says
    # Their mean has forgotten most of it.
    assert found["model", "AUC of loss"].value < found["upload", "AUC of loss"].value
    assert "tokens alone do not" in found["rows alone", "AUC of a blind baseline"].says


def test_rows_that_nobody_learnt_are_at_chance(case: Case) -> None:
    shards = case.session.federation.shards.values()
    untouched = [row for shard in shards for row in shard.test]
    for name, area in scores(case, untouched[::2], untouched[1::2]).items():
        assert area == pytest.approx(0.5, abs=0.06), name
    blind = auc(*blind_scores(untouched[::2], untouched[1::2], seed=1))
    assert blind == pytest.approx(0.5, abs=0.06)


def test_rows_of_another_kind_are_called_a_shift_and_not_membership(case: Case) -> None:
    shards = case.session.federation.shards.values()
    plain = [row for shard in shards for row in shard.test]
    # The same rows in another order of letters: no model is needed to tell which is which.
    moved = [
        Example(
            torch.where(row.ids % 3 == 0, row.ids.min(), row.ids), row.labels, row.prompt_length
        )
        for row in plain
    ]
    blind = separation(*blind_scores(plain, moved, seed=1), seed=1).auc
    assert blind.value > 0.9
    assert shifted(blind)
    assert not shifted(Interval(0.4, 0.35, 0.45)), "what one group has, the other lacks"
    assert not shifted(Interval(0.58, 0.48, 0.7))


def test_a_run_that_leaves_nothing_to_compare_is_passed_over(case: Case) -> None:
    shards = {
        client: replace(shard, validation=(), test=shard.train)
        for client, shard in case.session.federation.shards.items()
    }
    federation = replace(case.session.federation, shards=shards)
    without = replace(case, session=replace(case.session, federation=federation))
    assert "no held-out rows that nobody learns" in (Membership().silent(without) or "")


def test_tensors_that_an_upload_lacks_stay_where_they_were(case: Case) -> None:
    one = next(case.uploads())
    before, delta = one.download["params"], dict(case.delta(one))
    name, rows = next(iter(delta)), case.session.federation.shards["c0"].test[:4]
    still = {**delta, name: torch.zeros_like(delta[name])}
    del delta[name]
    assert record_scores(case.session, before, delta, rows) == record_scores(
        case.session, before, still, rows
    )
