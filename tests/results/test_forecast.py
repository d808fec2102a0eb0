"""A forecast is what the rounds ask, times what two probes cost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom import experiment
from fedloom.client import setup
from fedloom.client.setup import batches
from fedloom.core.protocols import Fit
from fedloom.data.federation import Shard
from fedloom.results import forecast as module
from fedloom.results.forecast import forecast
from fedloom.results.probes import LARGE, SMALL, Cost, Line, Probes
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

    def counted(*args: object) -> object:
        for step in batches(*args):  # type: ignore[arg-type]
            drawn.append(sum(len(row.ids) for row in step))
            yield step

    monkeypatch.setattr(setup, "batches", counted)
    experiment.run(small_recipe(run={"rounds": 1}), tmp_path / "run")
    assert seen[0] == 4
    assert seen[1] == sum(drawn)
    assert max(drawn) <= seen[2] <= sum(drawn)


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
    assert probes.training(Fit(session.space.start())).seconds.at(100) > 0
    assert probes.judging().seconds.at(100) > 0
    assert probes.writing(4).seconds.at(4, 1) > 0
