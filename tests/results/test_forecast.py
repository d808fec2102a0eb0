"""A forecast is what the rounds ask, times what two probes cost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.client.fast.kernels import FastPath
from fedloom.core.protocols import Evaluate, Fit, Job
from fedloom.data.federation import Shard
from fedloom.evaluation.generation import Generation
from fedloom.objectives.batch import Batch
from fedloom.objectives.forward import Forward, Predictions
from fedloom.results import forecast as module
from fedloom.results import played
from fedloom.results.forecast import forecast
from fedloom.results.played import play
from fedloom.results.probes import LARGE, SMALL, Cost, Line, Loads, Probes
from fedloom.rounds.loop import advance, begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session, build
from fedloom.spaces.seed_space import SeedSpace

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("small", "large", "line"),
    [
        ((10, 3.0), (30, 7.0), Line(1.0, 0.2)),
        # Noise that leaves less than nothing, or no growth: through the origin.
        ((10, 1.0), (30, 6.0), Line(0.0, 0.2)),
        ((10, 7.0), (30, 6.0), Line(0.0, 0.2)),
        ((30, 6.0), (30, 6.0), Line(0.0, 0.2)),
    ],
)
def test_a_line_through_two_points(
    small: tuple[float, float], large: tuple[float, float], line: Line
) -> None:
    found = Line.through(small, large)
    assert (found.constant, found.slope) == pytest.approx((line.constant, line.slope))
    assert found.at(100, 2) == pytest.approx(2 * line.constant + 100 * line.slope)


@pytest.fixture
def built(small_recipe: Make, tmp_path: Path) -> tuple[Session, dict[str, Shard]]:
    session = build(small_recipe(run={"rounds": 2}, evaluation={"every": 1}), tmp_path / "plan")
    shards = session.federation.shards
    assert isinstance(shards, dict)
    return session, shards


def test_what_a_round_asks_is_what_it_then_draws(
    built: tuple[Session, dict[str, Shard]],
    small_recipe: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    session, shards = built
    seen: list[int] = []
    asked = module._asked

    def spy(*args: object) -> object:
        found = asked(*args)  # type: ignore[arg-type]
        seen.extend((found.pieces, found.tokens, found.largest))
        return found

    monkeypatch.setattr(module, "_asked", spy)
    forecast(session, shards)
    drawn: list[int] = []
    made = FastPath.batches

    def counted(*args: Any) -> Iterator[Batch]:
        for batch in made(*args):
            drawn.append(batch.ids.numel())
            yield batch

    monkeypatch.setattr(FastPath, "batches", counted)
    experiment.run(small_recipe(run={"rounds": 1}), tmp_path / "run")
    assert seen == [4, sum(drawn), max(drawn)]


def test_every_answer_and_every_round_costs(
    built: tuple[Session, dict[str, Shard]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, shards = built
    second = Cost(0.0, Line(1.0, 0.0), Line(1e6, 0.0))
    monkeypatch.setattr(Probes, "training", lambda self, work: Cost(10.0, Line(0, 0), Line(2e6, 0)))
    monkeypatch.setattr(Probes, "judging", lambda self: second)
    monkeypatch.setattr(
        Probes, "writing", lambda self, rows: Cost(0.0, Line(0.0, 100.0), Line(0, 0))
    )
    found = forecast(session, shards)
    # Two rounds of four clients.
    assert found.train_seconds == pytest.approx(80.0)
    # Before, after each round: both splits a second each; then a hundred a token of the answers.
    counts = sum(len(shards[c].test) for c in session.judges)
    tokens = (found.evaluate_seconds - 6) / 100
    assert 3 * counts <= tokens <= 3 * counts * 3


@pytest.mark.parametrize("every", [0, 1])
def test_weights_are_rebuilt_once_a_round_along_the_seeds_drawn_by_then(
    every: int, small_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = small_recipe(
        algorithm={"fedkseed": {"steps": 2}},
        tune={"seeds": {"num_seeds": 16}},
        local={"steps": None, "optimizer": "sgd"},
        evaluation={"every": every, "generate": False},
    )
    session = build(recipe, tmp_path)
    monkeypatch.setattr(Probes, "loads", lambda self: Loads())
    nothing = Cost(0.0, Line(0.0, 0.0), Line(0.0, 0.0))
    monkeypatch.setattr(Probes, "training", lambda self, work: nothing)
    monkeypatch.setattr(Probes, "judging", lambda self: nothing)
    monkeypatch.setattr(SeedSpace, "rebuild_seconds", lambda self: 16.0)
    shards = session.federation.shards
    assert isinstance(shards, dict)
    found = forecast(session, shards)
    # Four clients draw two seeds of sixteen in each of three rounds.
    after = [16 * (1 - (15 / 16) ** (8 * number)) for number in range(4)]
    assert found.evaluate_seconds == pytest.approx(sum(after) if every else after[3])
    assert found.train_seconds == pytest.approx(0 if every else after[1] + after[2], abs=1e-9)


def seeds_of(small_recipe: Make, folder: Path, **seeds: object) -> Session:
    recipe = small_recipe(
        algorithm={"fedkseed": {"steps": 2}},
        tune={"seeds": {"num_seeds": 16, **seeds}},
        local={"steps": None, "optimizer": "sgd"},
        evaluation={"every": 1, "generate": False, "validation": False},
        run={"rounds": 2},
    )
    return build(recipe, folder)


def test_each_client_alone_brings_the_weights_to_where_they_are(
    small_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing = Cost(0.0, Line(0.0, 0.0), Line(0.0, 0.0))
    monkeypatch.setattr(Probes, "training", lambda self, work: nothing)
    monkeypatch.setattr(Probes, "judging", lambda self: nothing)
    monkeypatch.setattr(Probes, "loads", lambda self: Loads(first=10.0, again=1.0))
    monkeypatch.setattr(SeedSpace, "rebuild_seconds", lambda self: 0.0)
    session = seeds_of(small_recipe, tmp_path)
    shards = session.federation.shards
    assert isinstance(shards, dict)
    found = forecast(session, shards)
    # After each of two rounds four clients are measured one by one, of whom the first is there first; four train once more.
    assert found.evaluate_seconds == pytest.approx(2 * (10 + 3))
    assert found.train_seconds == pytest.approx(4)


@pytest.mark.parametrize(("distribution", "goes_on"), [("gaussian", False), ("rademacher", True)])
def test_sums_of_integers_go_on_from_the_last_round(
    distribution: str,
    goes_on: bool,
    small_recipe: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(SeedSpace, "rebuild_seconds", lambda self: 16.0)
    session = seeds_of(small_recipe, tmp_path, distribution=distribution)
    one = 16 * (1 - (15 / 16) ** 8)
    two = one if goes_on else 16 * (1 - (15 / 16) ** 16)
    found = module._rebuilt(session, play(session, None), Loads())
    assert found == pytest.approx({1: one, 2: two})


def test_padding_and_equal_rows_are_counted_as_they_are_measured(
    small_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = build(
        small_recipe(evaluation={"batch_size": 3, "validation": False}), tmp_path / "plan"
    )
    shards = session.federation.shards
    assert isinstance(shards, dict)
    probes = Probes(session, shards, 4)
    planned = module._measured(session, probes, 0, "test")
    seen: dict[str, list[int]] = {"scored": [], "answered": []}
    predictions, write = Forward.predictions, Generation._write

    def scored(self: Forward, batch: Batch) -> Predictions:
        seen["scored"].append(batch.ids.numel())
        return predictions(self, batch)

    def written(self: Generation, prompts: Any, *args: Any) -> Any:
        seen["answered"].append(len(prompts) * max(map(len, prompts)))
        return write(self, prompts, *args)

    monkeypatch.setattr(Forward, "predictions", scored)
    monkeypatch.setattr(Generation, "_write", written)
    work = Evaluate(session.space.start(), "test")
    session.trainer.run([Job(client, 1, 0, work) for client in session.judges])
    assert seen == {"scored": planned.batches, "answered": planned.prompts}
    assert planned.calls == 1


@pytest.mark.parametrize(
    ("algorithm", "first"),
    [
        ([{"fedem": {"components": 2}}, "fedavg"], 1),
        ([{"clustered": {"mode": {"balanced": {"num_clusters": 2}}}}, "fedavg"], 3),
    ],
    ids=["fedem", "balanced"],
)
def test_what_is_measured_on_the_way_to_what_is_trained_is_counted(
    algorithm: Any,
    first: int,
    small_recipe: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipe = small_recipe(algorithm=algorithm, run={"rounds": 3})
    session = build(recipe, tmp_path / "plan")
    shards = session.federation.shards
    assert isinstance(shards, dict)
    second = Cost(0.0, Line(1.0, 0.0), Line(0.0, 1e9))
    nothing = Cost(0.0, Line(0.0, 0.0), Line(0.0, 0.0))
    monkeypatch.setattr(Probes, "training", lambda self, work: nothing)
    monkeypatch.setattr(Probes, "writing", lambda self, rows: nothing)
    monkeypatch.setattr(Probes, "judging", lambda self: second)
    found = forecast(session, shards)
    planned = module._looks(session, found.rounds, Probes(session, shards, 4))
    seen: list[list[int]] = []
    predictions = Forward.predictions

    def scored(self: Forward, batch: Batch) -> Predictions:
        seen[-1].append(batch.ids.numel())
        return predictions(self, batch)

    monkeypatch.setattr(Forward, "predictions", scored)
    run = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
    people = {name: p for name, p in session.learners.items() if not name.startswith("probe")}
    for _ in range(3):
        seen.append([])
        run, _, _ = advance(
            run, recipe.algorithm, session.engine, population=people, sampler=recipe.cohort
        )
    assert [sorted(each) for each in seen] == [sorted(each) for each in planned]
    assert all(bool(each) == (number >= first) for number, each in enumerate(seen, 1))
    assert found.train_seconds == pytest.approx(sum(map(len, seen)))
    assert found.peak_memory_bytes >= 1e9 * max(max(each, default=0) for each in seen)


@pytest.mark.parametrize(
    ("layers", "few", "more"), [([], True, 0), (["partial_pooling"], False, 4)]
)
def test_pieces_that_only_some_ask_for_are_counted_where_they_are(
    layers: list[str],
    few: bool,
    more: int,
    small_recipe: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipe = small_recipe(algorithm=[*layers, "clustered", "fedavg"], run={"rounds": 4})
    session = build(recipe, tmp_path / "plan")
    if not few:
        monkeypatch.setattr(played, "FEW", 0)
    shards = session.federation.shards
    assert isinstance(shards, dict)
    second = Cost(1.0, Line(0.0, 0.0), Line(0.0, 0.0))
    monkeypatch.setattr(Probes, "training", lambda self, work: second)
    # Two probes of each of four clients: the first is its training, the second a piece more. One of four trains twice.
    assert forecast(session, shards).train_seconds == pytest.approx(4 * 4 + 4 + more)


@pytest.mark.parametrize("few", [True, False])
def test_messages_are_those_of_what_was_learnt(
    few: bool, small_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a client says of its training is in its message too."""
    recipe = small_recipe(
        algorithm=[{"flasc": {"download": 0.25, "upload": 0.25}}, "fedavg"],
        wire={"download": "int8", "upload": "int8"},
        tune={"lora": {"rank": 16, "targets": "all-linear"}},
        evaluation={"generate": False, "every": 0},
        run={"rounds": 4},
    )
    session = build(recipe, tmp_path / "plan")
    shards = session.federation.shards
    assert isinstance(shards, dict)
    if not few:
        monkeypatch.setattr(played, "FEW", 0)
    found = forecast(session, shards)
    summary = experiment.run(recipe, tmp_path / "run").summary
    measured = summary["upload_bytes"] + summary["download_bytes"]
    assert found.total_bytes == pytest.approx(measured, rel=0.03)
    assert len(found.rounds) == (4 if few else played.ROUNDS)


def test_probes_are_rows_of_the_clients_and_of_two_sizes(
    built: tuple[Session, dict[str, Shard]],
) -> None:
    session, shards = built
    rows = {id(row) for shard in shards.values() for row in shard.train}
    probes = Probes(session, shards, 2)
    assert probes.lanes == 2
    small, large = (shards[f"{name} 0"].train for name in (SMALL, LARGE))
    assert {id(row) for row in (*small, *large)} <= rows
    assert sum(len(r.ids) for r in small) < sum(len(r.ids) for r in large)
    # As FedEM asks for: what a client's own rows count, which are not as many.
    work = Fit(session.space.start(), example_weights=torch.rand(3))
    assert probes.training(work).seconds.at(100) > 0
    assert probes.judging().seconds.at(100) > 0
    assert probes.writing(4).seconds.at(4, 1) > 0


def test_probes_of_an_evaluation_are_as_large_as_its_batches(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Clients that are measured together share batches, of which each gives few rows."""
    session = build(small_recipe(evaluation={"batch_size": 6, "max_examples": 2}), tmp_path)
    shards = session.federation.shards
    assert isinstance(shards, dict)
    probes = Probes(session, shards, 2)
    together = min(session.trainer.width, len(session.judges))
    assert len(probes.judged[LARGE]) == min(6, 2 * together)
    keys = {row.key for row in probes.judged[LARGE]}
    assert len(keys) == len(probes.judged[LARGE])
    shared = [shards[f"{LARGE} {at}"].test for at in range((len(keys) + 1) // 2)]
    assert [row.key for rows in shared for row in rows] == [r.key for r in probes.judged[LARGE]]
    assert max(map(len, shared)) <= 2
    assert probes.judging().seconds.at(100) > 0
