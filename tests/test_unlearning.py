"""A run replayed without a client is the run in which it never answers, and no sum with a part taken out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import experiment
from fedloom.core.params import norm, sub
from fedloom.core.protocols import Reply
from fedloom.engines.loopback import Loopback
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.loop import advance, begin, draw
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session, build
from fedloom.server.samplers import Without
from fedloom.unlearning import FILE, unlearn, without


@pytest.fixture(scope="module")
def original(
    small_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """Return a run of three of four clients a round."""
    recipe = small_recipe(
        cohort={"uniform": {"size": 3}},
        local={"batched": "off"},
        evaluation={"generate": False},
        run={"rounds": 4, "samples": 0},
    )
    folder = tmp_path_factory.mktemp("unlearning") / "run"
    experiment.run(recipe, folder)
    return recipe, folder


@pytest.fixture(scope="module")
def client(original: tuple[Recipe, Path]) -> str:
    """Return the name of one that is to be left out."""
    _, folder = original
    return sorted(json.loads((folder / "manifest.json").read_text())["clients"])[1]


def states(session: Session, engine: Any, clients: Any, sampler: Any) -> list[Any]:
    """Return the run before the first and after every round."""
    recipe = session.recipe
    runs = [begin(recipe.algorithm, session.space.start(), recipe.run.seed)]
    while runs[-1].number < recipe.run.rounds:
        after, *_ = advance(runs[-1], recipe.algorithm, engine, population=clients, sampler=sampler)
        runs.append(after)
    return runs


def test_a_replay_is_the_run_in_which_the_client_never_answers(
    original: tuple[Recipe, Path], client: str, tmp_path: Path
) -> None:
    recipe, folder = original
    result = unlearn(folder, [client], tmp_path / "replay")
    origin = json.loads((tmp_path / "replay" / FILE).read_text())
    assert (origin["clients"], origin["rounds"]) == ([client], 4)
    # Another way there: everybody is asked, over messages, and its are lost.
    session = build(recipe, tmp_path / "lost")
    there = session.engine
    engine = Loopback(
        there.algorithm,  # type: ignore[attr-defined]
        there.trainer,  # type: ignore[attr-defined]
        there.store,  # type: ignore[attr-defined]
        there.clients,  # type: ignore[attr-defined]
        lost=frozenset({client}),
    )
    lost = states(session, engine, session.learners, recipe.cohort)[-1]
    assert result.summary["state_sha256"] == state_sha256(lost)
    before = json.loads((folder / "summary.json").read_text())
    assert result.summary["state_sha256"] != before["state_sha256"]
    told = [json.loads(x) for x in (tmp_path / "replay/clients.jsonl").read_text().splitlines()]
    assert client not in {row["client"] for row in told}
    # Once more, it goes on with what is there.
    assert unlearn(folder, [client], tmp_path / "replay").summary == result.summary
    with pytest.raises(ValueError, match="without other clients"):
        unlearn(folder, [sorted(session.learners)[0]], tmp_path / "replay")


def test_taking_a_part_out_of_recorded_sums_is_another_model(
    original: tuple[Recipe, Path], client: str, tmp_path: Path
) -> None:
    """What the others sent was learnt from models that the client had moved."""
    recipe, _ = original
    session = build(recipe, tmp_path / "a")
    kept: list[list[Reply]] = []

    class Recording:
        def run(self, asked: Any) -> Any:
            found = list(session.engine.run(asked))
            kept.append([d.answer for d in found if isinstance(d.answer, Reply)])
            return iter(found)

    states(session, Recording(), session.learners, recipe.cohort)
    run = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    for replies in kept:
        round = draw(run, session.learners, recipe.cohort)
        others = [reply for reply in replies if reply.client != client]
        state, _ = recipe.algorithm.server_update(run.state, round, others)
        run = replace(run, number=run.number + 1, state=state)
    made = build(without(recipe, [client]), tmp_path / "b")
    sampler = made.sampler
    assert isinstance(sampler, Without)
    exact = states(made, made.engine, made.learners, sampler)[-1]
    gap = norm({"": sub(run.state.params, exact.state.params)})
    moved = norm({"": sub(exact.state.params, made.space.start())})
    assert gap > 1e-3 * moved


def test_what_cannot_be_replayed_says_why(
    original: tuple[Recipe, Path], client: str, tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    _, folder = original
    with pytest.raises(ValueError, match=r"one of the run's 4 clients .*got 'nobody'"):
        unlearn(folder, ["nobody"], tmp_path / "x")
    with pytest.raises(ValueError, match="nobody is to be left out"):
        unlearn(folder, [], tmp_path / "x")
    everybody = sorted(json.loads((folder / "manifest.json").read_text())["clients"])
    with pytest.raises(ValueError, match="leaves nobody who has something to learn from"):
        unlearn(folder, everybody, tmp_path / "x")
    text = (folder / "recipe.yaml").read_text()
    for change, said in (
        (("engine:\n  inprocess: {}", "engine:\n  flower: {nodes: 0}"), "its data is at sites"),
        (
            ("algorithm:\n", "algorithm:\n- private: {clip: 1.0, noise_multiplier: 1.0}\n"),
            "a second time",
        ),
    ):
        assert change[0] in text
        other = tmp_path / said.split()[0]
        other.mkdir()
        changed = text.replace(*change).replace("uniform:\n    size: 3", "poisson:\n    q: 0.5")
        (other / "recipe.yaml").write_text(changed)
        for name in ("manifest.json", "metrics.jsonl"):
            (other / name).write_bytes((folder / name).read_bytes())
        with pytest.raises(ValueError, match=said):
            unlearn(other, [client], tmp_path / "x")
    with pytest.raises(ValueError, match=r"data\.left_out must be clients .*got 'nobody'"):
        build(small_recipe(data={"left_out": ["nobody"]}), tmp_path / "y")
