"""What a run's memory is made of, and the batch that fits into what is free."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import experiment
from fedloom.recipe import load_recipe
from fedloom.results import memory
from fedloom.results.forecast import held_by_round
from fedloom.results.memory import largest_term, open_to_probes, with_batch_size
from fedloom.results.probes import Cost, Line, Probes
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Recipe]
ADAMW = {"optimizer": "adamw"}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what sets the memory that a step is measured to take, and what is free."""

    def set_(*, token: float, room: float) -> None:
        cost = Cost(0.0, Line(0.0, 0.0), Line(0.0, token))
        monkeypatch.setattr(Probes, "training", lambda *_: cost)
        monkeypatch.setattr(memory, "allowed_bytes", lambda: room)

    return set_


def test_auto_is_the_most_examples_that_fit(
    small_recipe: Make, measured: Callable[..., None], tmp_path: Path
) -> None:
    asked = small_recipe(local={"batch_size": "auto"})
    session, shards = open_to_probes(
        replace(asked, local=replace(asked.local, batch_size=1)), tmp_path
    )
    rows = [row for shard in shards.values() for row in shard.train]
    longest, most = max(row.num_tokens for row in rows), max(len(s.train) for s in shards.values())
    kept = held_by_round(session, 4)
    for room, wanted in ((3.5, 3), (1.2, 1), (1e6, most)):
        measured(token=10.0, room=kept + room * longest * 10)
        assert with_batch_size(asked).local.rows == wanted
    measured(token=10.0, room=kept + 0.9 * longest * 10)
    with pytest.raises(
        ValueError, match=rf"one example of {longest} tokens needs .*gradient_checkpointing"
    ):
        with_batch_size(asked)


def test_a_run_keeps_the_batch_that_it_was_begun_with(
    small_recipe: Make, measured: Callable[..., None], tmp_path: Path
) -> None:
    asked = small_recipe(local={"batch_size": "auto"}, run={"rounds": 1}, evaluation={"every": 0})
    measured(token=0.0, room=1e12)
    experiment.run(asked, tmp_path)
    rows = load_recipe(tmp_path / "recipe.yaml").local.rows
    assert rows > 4
    # Nothing would fit now, which is nothing to a run that is there.
    measured(token=1e9, room=0.0)
    experiment.run(asked, tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml").local.rows == rows


def test_auto_is_refused_where_each_process_has_memory_of_its_own(small_recipe: Make) -> None:
    with pytest.raises(ValueError, match="auto is for engine inprocess"):
        with_batch_size(small_recipe(local={"batch_size": "auto"}, engine="ray"))
    with pytest.raises(ValueError, match=r"local\.batch_size"):
        small_recipe(local={"batch_size": "automatic"})
    with pytest.raises(ValueError, match="auto becomes a number where"):
        _ = small_recipe(local={"batch_size": "auto"}).local.rows


@pytest.mark.parametrize(
    ("sections", "activations", "words"),
    [
        ({}, 10**9, "activations of a batch, 1.00 GB: model.gradient_checkpointing true"),
        ({"model": {"gradient_checkpointing": True}}, 10**9, "1.00 GB: a smaller local.batch_size"),
        ({}, 0, "the model's weights, .*: model.dtype bfloat16"),
        ({"model": {"quantize": "int8"}}, 0, "the model.s weights, .*: model.quantize nf4, or a"),
        ({"model": {"quantize": "int4"}}, 0, "the model.s weights, .*: a smaller model"),
        ({"tune": "full", "local": ADAMW}, 0, "the optimizer's moments, .*: local.moments float8"),
        ({"tune": "full", "local": {**ADAMW, "moments": "float8"}}, 0, "the model's weights"),
    ],
)
def test_the_largest_term_is_named_with_what_lowers_it(
    sections: Any, activations: int, words: str, small_recipe: Make, tmp_path: Path
) -> None:
    session, _ = open_to_probes(small_recipe(**sections), tmp_path)
    found = largest_term(session, activations, 0)
    assert re.search(words, found), found
