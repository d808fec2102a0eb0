"""Buffered rounds: by hand on a number in the place of a model, and whole runs with clients in training."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import ClientFailure, Delivery, Profile, Reply, Task
from fedloom.results.plan import make_plan
from fedloom.rounds.buffered import BufferedRun, advance_buffered, buffered
from fedloom.rounds.clock import Clock, Durations
from fedloom.rounds.loop import begin, draw
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.training import FinishedRound
from fedloom.server.buffering import Buffered, Synchronous
from fedloom.server.optimizers import SGD
from fedloom.server.samplers import Full, Sampler, Uniform

Learns = Callable[[float], float]


@dataclass
class Numbers:
    """Clients whose model is one number; `learns` says where each ends from where it begins."""

    learns: Mapping[str, Learns]
    lost: frozenset[str] = frozenset()
    asked: list[tuple[int, str]] = field(default_factory=list)

    def population(self) -> Mapping[str, Profile]:
        return {client: {"tier": client} for client in sorted(self.learns)}

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        for task in tasks:
            self.asked.append((task.round, task.client))
            if task.client in self.lost:
                yield Delivery(ClientFailure(task.client, "gone"), 10)
                continue
            start = task.download["params"]["w"]
            end = self.learns[task.client](float(start))
            delta = torch.tensor(end, dtype=torch.float64) - start
            yield Delivery(Reply(task.client, {"delta": {"w": delta}}), 10, 5)


def play(
    engine: Numbers,
    mode: Buffered,
    count: int,
    *,
    seconds: Mapping[str, float] | None = None,
    sampler: Sampler | None = None,
    lr: float = 1.0,
    run: Any = None,
) -> tuple[Any, list[Any]]:
    """Return the run after so many steps from w = 0, and what each told."""
    algorithm, people = FedAvg(SGD(lr), weighting="uniform"), engine.population()
    start = {"w": torch.zeros((), dtype=torch.float64)}
    run, told = run or buffered(begin(algorithm, start, 5)), []
    clock = Durations(Clock(tiers=dict(seconds or {})), dict.fromkeys(people, 1))
    while run.number < count:
        run, *line = advance_buffered(
            run,
            algorithm,
            engine,
            mode=mode,
            durations=clock,
            population=people,
            sampler=sampler or Full(),
            max_update_norm=1e4,
        )
        told.append(line)
    return run, told


def plus_one(w: float) -> float:
    return w + 1.0


def value(run: Any) -> float:
    return float(run.state.params["w"])


def test_two_clients_of_one_version_add_one_and_its_root() -> None:
    """The second answers to the model before the first's step: 1 + 1 / sqrt(2), not less."""
    engine = Numbers({"a": plus_one, "b": plus_one})
    run, told = play(engine, Buffered(1), 2, seconds={"b": 1.5})
    assert value(run) == pytest.approx(1 + 1 / math.sqrt(2), abs=1e-12)
    assert [line["server/staleness"] for line, _ in told] == [0, 1]
    assert run.seconds == 1.5
    assert run.flights.keys() == {"a"}


def test_a_step_divides_by_the_size_of_the_buffer() -> None:
    """FedBuff: eta / K sum s(tau) delta; c is two steps late, beside a fresh one."""
    engine = Numbers({"a": plus_one, "b": plus_one, "c": plus_one})
    run, told = play(engine, Buffered(2), 3, seconds={"c": 2.5}, lr=0.5)
    # a and b at 1 and 2; at 2.5 c alone is there, and at 3 a completes the third step.
    expected = 0.5 * 1 + 0.5 * 1 + 0.5 * (1 / math.sqrt(3) + 1) / 2
    assert value(run) == pytest.approx(expected, abs=1e-12)
    assert told[-1][0]["server/max_staleness"] == 2
    assert told[-1][0]["server/num_versions"] == 2
    assert [line["time/virtual_seconds"] for line, _ in told] == [1, 1, 1]


def test_one_answer_a_step_mixing_models_is_fedasync() -> None:
    """w = (1 - alpha s) w + alpha s w_i, step by step, in whatever order clients answer."""
    ends = {"a": 3.0, "b": -2.0, "c": 10.0}

    def halfway(to: float) -> Callable[[float], float]:
        return lambda w: w + 0.5 * (to - w)

    engine = Numbers({c: halfway(at) for c, at in ends.items()})
    seconds, alpha, steps = {"b": 1.7, "c": 3.1}, 0.6, 7
    run, told = play(engine, Buffered(1, mixes="models"), steps, seconds=seconds, lr=alpha)
    w, versions = 0.0, [0.0]
    free = {client: (seconds.get(client, 1.0), 0) for client in ends}
    ages = []
    for step in range(steps):
        client = min(free, key=lambda c: free[c])
        now, began = free[client]
        start, age = versions[began], step - began
        own = start + 0.5 * (ends[client] - start)
        share = alpha * (1 + age) ** -0.5
        w = (1 - share) * w + share * own
        versions.append(w)
        ages.append(age)
        free[client] = now + seconds.get(client, 1.0), step + 1
    assert max(ages) > 1, "somebody is late"
    assert [line["server/staleness"] for line, _ in told] == ages
    assert value(run) == pytest.approx(w, abs=1e-9)


def test_an_answer_that_is_too_old_is_dropped_and_counted() -> None:
    engine = Numbers({"a": plus_one, "b": plus_one})
    mode = Buffered(1, max_staleness=2)
    run, told = play(engine, mode, 8, seconds={"b": 5.5})
    # b comes at 5.5, five steps late, and takes no step.
    assert value(run) == 8
    assert sum(line["comm/num_stale"] for line, _ in told) == 1
    assert told[5][0]["comm/num_stale"] == 1
    assert all(not failures for _, failures in told)


def test_a_lost_client_is_a_failure_and_the_buffer_waits_for_another() -> None:
    engine = Numbers(dict.fromkeys("abcd", plus_one), frozenset("b"))
    _, told = play(engine, Buffered(2), 1, seconds={"c": 2.0, "d": 3.0})
    (line, failures), *_ = told
    assert line["comm/num_replies"] == 2
    assert [failure.client for failure in failures] == ["b"]
    assert line["time/virtual_seconds"] == 2.0
    # Where nobody is left who could answer, the step is taken on fewer.
    alone = Numbers(dict.fromkeys("ab", plus_one), frozenset("b"))
    run, told = play(alone, Buffered(2), 1)
    assert (value(run), told[0][0]["comm/num_replies"]) == (1.0, 1)


def test_bytes_are_counted_where_clients_begin() -> None:
    engine = Numbers(dict.fromkeys("abcd", plus_one))
    _, told = play(engine, Buffered(2), 3, sampler=Uniform(3), seconds={"a": 2.0, "b": 3.0})
    down = sum(line["comm/download_bytes"] for line, _ in told)
    assert down == 10 * len(engine.asked)
    assert all(line["comm/num_training"] <= 3 for line, _ in told)


def test_nobody_trains_twice_at_once_nor_is_twice_in_a_step() -> None:
    people = {f"c{i:02}": plus_one for i in range(12)}
    seconds = {client: 0.3 + 0.41 * at for at, client in enumerate(people)}
    engine = Numbers(people)
    run, _ = play(engine, Buffered(5), 30, sampler=Uniform(7), seconds=seconds)
    assert len(engine.asked) == len(set(engine.asked)), "once a version"
    assert len(run.flights) + 30 * 5 == len(engine.asked), (
        "every answer was taken up or is under way"
    )
    assert {client for _, client in engine.asked} == people.keys()


def test_whom_the_first_cohort_holds_is_whom_a_synchronous_round_asks() -> None:
    engine = Numbers({f"c{i}": plus_one for i in range(9)})
    play(engine, Buffered(4), 1, sampler=Uniform(4))
    start = begin(FedAvg(), {"w": torch.zeros(())}, 5)
    drawn = draw(start, engine.population(), Uniform(4)).cohort
    assert [client for _, client in engine.asked] == list(drawn)


def test_durations_are_of_tier_steps_and_chance() -> None:
    clock = Clock(seconds=2.0, tiers={"slow": 10.0})
    plain = Durations(clock, {"a": 4, "b": 4, "c": 8})
    assert plain.of("a", {}, round_seed=1) == 2.0
    assert plain.of("b", {"tier": "slow"}, round_seed=1) == 20.0
    assert plain.of("c", {"tier": "other"}, round_seed=1) == 4.0
    spread = Durations(replace(clock, spread=0.2), plain.steps)
    drawn = [math.log(spread.of("a", {}, round_seed=seed) / 2) for seed in range(400)]
    assert abs(sum(drawn) / 400) < 0.04
    assert 0.17 < torch.tensor(drawn).std() < 0.23
    assert spread.of("a", {}, round_seed=3) == spread.of("a", {}, round_seed=3)


# --- whole runs --------------------------------------------------------------------------------


SLOW: dict[str, Any] = {
    "data": {"tiers": {"fast": 0.75, "slow": 0.25}},
    "clock": {"tiers": {"slow": 3.3}, "spread": 0.1},
}
RUN: dict[str, Any] = {
    "rounds": 6,
    "mode": {"buffered": {"size": 2, "max_staleness": 9}},
    "baselines": ["synchronous"],
    "samples": 0,
}


@pytest.fixture(scope="module")
def whole(
    small_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """Return a buffered run with its synchronous baseline."""
    recipe = small_recipe(**SLOW, algorithm=["ditto", "fedavg"], run=RUN)
    folder = tmp_path_factory.mktemp("buffered") / "whole"
    experiment.run(recipe, folder)
    return recipe, folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(folder: Path) -> list[dict[str, Any]]:
    clocks = re.compile(r"memory/|seconds$|time/(?!virtual)")
    return [{k: v for k, v in line.items() if not clocks.search(k)} for line in lines(folder)]


def test_a_run_that_dies_with_clients_in_training_goes_on_to_the_bit(
    whole: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = whole
    recipe = replace(recipe, run=replace(recipe.run, baselines=()))

    class Death(Exception):
        pass

    def dies(finished: FinishedRound) -> None:
        if finished.number in (2, 5):
            raise Death

    for _ in range(2):
        with pytest.raises(Death):
            experiment.run(recipe, tmp_path / "died", callbacks=[dies])
    left = next((tmp_path / "died" / "checkpoints").glob("round-000005.ckpt"))
    assert left.stat().st_size > 0
    experiment.run(recipe, tmp_path / "died")
    assert without_time(tmp_path / "died") == without_time(folder)
    ends = [json.loads((at / "summary.json").read_text()) for at in (folder, tmp_path / "died")]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"]
    assert any(line.get("comm/num_training") for line in lines(folder))


def test_its_report_shows_the_event_clock_beside_the_synchronous_run(
    whole: tuple[Recipe, Path],
) -> None:
    _, folder = whole
    rounds, beside = lines(folder)[1:], lines(folder / "baselines" / "synchronous")[1:]
    # Six steps of two answers are three rounds of four clients.
    assert len(beside) == 3
    took, waited = (sum(line["time/virtual_seconds"] for line in each) for each in (rounds, beside))
    assert took < 0.7 * waited
    assert max(line["server/max_staleness"] for line in rounds) >= 1
    page = (folder / "report.html").read_text()
    assert "Event clock" in page
    assert f"small: {took:.4g} s" in page
    assert f"synchronous: {waited:.4g} s" in page
    for label in ("Test loss by virtual time", "Staleness of the answers"):
        assert f'aria-label="{label}' in page


def test_a_plan_counts_steps_and_not_cohorts(whole: tuple[Recipe, Path]) -> None:
    recipe, folder = whole
    sent = sum(
        line["comm/upload_bytes"] + line["comm/download_bytes"] for line in lines(folder)[1:]
    )
    plan = make_plan(replace(recipe, run=replace(recipe.run, baselines=())))
    # What the clients that are still in training were sent is not in it.
    assert plan.total_bytes == pytest.approx(sent * 12 / 14, rel=0.1)


def test_an_old_checkpoint_is_no_buffered_run(whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = whole
    shutil.copytree(folder, tmp_path / "copy")
    waiting = replace(recipe, run=replace(recipe.run, mode=Synchronous(), baselines=()))
    with pytest.raises(ValueError, match=r"run\.mode"):
        experiment.run(waiting, tmp_path / "copy")


def test_a_fresh_run_holds_nobody() -> None:
    fresh = buffered(begin(FedAvg(), {"w": torch.zeros(())}, 1))
    assert isinstance(fresh, BufferedRun)
    assert (fresh.seconds, dict(fresh.flights)) == (0.0, {})
