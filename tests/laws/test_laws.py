"""What holds for every algorithm of the table, on real trainers, engines and checkpoints."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms import ALGORITHMS
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.local import LocalOnly
from fedloom.core.protocols import Algorithm, Round
from fedloom.engines.inprocess import InProcess
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.loop import draw, tasks
from fedloom.server.samplers import Full, Uniform
from fedloom.testing import check_algorithm
from fedloom.testing.compare import distance
from fedloom.testing.examination import LAWS, examine
from fedloom.testing.subject import Subject
from fedloom.testing.watched import BrokenLaw
from fedloom.wire.wire_settings import WireSettings

Any_ = Algorithm[Any]
BROKEN_BY_DESIGN = {
    ("flasc(clustered(ditto(fedavg)))", "still"): "a personal model begins at a denser download",
    ("prune(fedavg)", "still"): "a mask shrinks round by round, and with it what is sent",
    ("prune(fedavg median)", "still"): "as above",
    ("private(prune(fedavg))", "still"): "as above",
    (
        "feedsign",
        "still",
    ): "it has no word for a step that was not taken, which votes against its direction",
}
"""By case and law: why it is not kept."""


def kinds(algorithm: Any) -> set[type]:
    inner = getattr(algorithm, "inner", None)
    return {type(algorithm)} | (kinds(inner) if inner else set())


def test_every_algorithm_of_the_table_is_under_these_laws(cases: dict[str, Any_]) -> None:
    assert set(ALGORITHMS.values()) == set().union(*map(kinds, cases.values()))


@pytest.mark.parametrize("law", LAWS)
def test_every_algorithm_of_the_table_keeps_every_law(
    law: str, subject: Subject, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["algorithm"]
    if (name, law) in BROKEN_BY_DESIGN:
        with pytest.raises(BrokenLaw):
            examine(subject, law)
        return
    why = examine(subject, law)
    assert why is None or law in {"number of replies", "server sees", "batched", "lateness"}


def test_check_algorithm_takes_all_of_them() -> None:
    report = check_algorithm(FedAvg())
    assert report.passed == tuple(LAWS)
    assert not report.inapplicable


@pytest.mark.parametrize("law", ["engines", "resume"])
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "ditto(freeze(fedavg))"])
def test_so_they_do_where_the_wire_loses_precision(
    name: str, law: str, cases: dict[str, Any_], tmp_path: Path
) -> None:
    wire = WireSettings(upload="int8", download="bfloat16")
    assert examine(Subject(cases[name], tmp_path, wire=wire), law) is None


def test_every_algorithm_moves_what_its_clients_use(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    engine = it.engine(InProcess, algorithm, tmp_path)
    run, _ = it.rounds(algorithm, engine, 2, sampler=Full())
    sent = algorithm.broadcast(run.state, draw(run, engine.population(), None))
    for client, download in sent.items():
        used = algorithm.deployed(download, engine.store.load(client, before=3))
        assert distance(used, it.space.start())[0] > 1e-3


def test_unselected_clients_keep_their_memory(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    engine = it.engine(InProcess, algorithm, tmp_path)
    it.rounds(algorithm, engine, 1, sampler=Full())
    before = {c: state_sha256(engine.store.load(c, 9)) for c in engine.population()}
    run, _ = it.rounds(algorithm, engine, 1, sampler=Uniform(2))
    cohort = algorithm.broadcast(run.state, draw(run, engine.population(), Uniform(2)))
    it.rounds(algorithm, engine, 2, run=run, sampler=Uniform(2))
    for client in engine.population():
        if client not in cohort:
            assert state_sha256(engine.store.load(client, 9)) == before[client]


# --- degenerate equivalences ---------------------------------------------------------------------


def test_fedprox_without_pull_is_fedavg(bench: Callable[..., Any], tmp_path: Path) -> None:
    it = bench()
    assert state_sha256(it.final(FedAvg(mu=0.0), tmp_path)) == state_sha256(
        it.final(FedAvg(), tmp_path)
    )


def test_ditto_leaves_the_shared_model_to_its_inner(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    a = it.final(Ditto(FedAvg(), 0.5), tmp_path / "a")
    assert state_sha256(a) == state_sha256(it.final(FedAvg(), tmp_path / "b"))


def test_freezing_a_is_training_with_a_held_fixed(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    run = it.final(Freeze(FedAvg()), tmp_path)
    sent = run.state.inner.params
    assert all("lora_B" in name for name in sent)
    assert max(float(p.abs().max()) for p in sent.values()) > 1e-4


def test_the_origin_does_not_matter_to_dense_training(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    a, b = bench(torch.float64), bench(torch.float64, {"origin": "zero"})
    x = a.space.absolute(a.final(FedAvg(mu=0.1), tmp_path / "a").state.params)
    y = b.final(FedAvg(mu=0.1), tmp_path / "b").state.params
    assert max(float((v - y[n]).abs().max()) for n, v in x.items()) < 1e-14


def test_four_equal_clients_with_one_full_step_are_one_centralised_step(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    """Equal numbers of target tokens, plain SGD, one full-batch step."""
    it = bench(torch.float64, steps=1, batch_size=8, max_grad_norm=None)
    shared = it.federation.shards
    pool = [row for shard in shared.values() for row in shard.train if len(row.ids) >= 10][:8]
    pool = [dataclasses.replace(row, ids=row.ids[:10], labels=row.labels[:10]) for row in pool]
    parts = {
        f"c{i}": dataclasses.replace(shared[f"c{i}"], train=pool[2 * i : 2 * i + 2])
        for i in range(4)
    }
    whole = {"c0": dataclasses.replace(shared["c0"], train=pool)}
    ends = []
    for shards in (parts, whole):
        shared.clear()
        shared.update(shards)
        ends.append(it.final(FedAvg(), tmp_path / str(len(shards)), 1, sampler=Full()))
    assert distance(ends[0].state.params, ends[1].state.params)[0] < 1e-15


def test_a_client_alone_is_moved_by_its_own_rows_only(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    ends = []
    for name in ("whole", "changed"):
        it = bench()
        if name == "changed":
            others = {c: it.federation.shards["c7"] for c in it.federation.shards if c != "c1"}
            it.federation.shards.update(others)
        engine = it.engine(InProcess, LocalOnly(), tmp_path / name, alike=True)
        it.rounds(LocalOnly(), engine, 2, sampler=Full())
        ends.append([state_sha256(engine.store.load(client, 9)) for client in ("c1", "c2")])
    (own, other), (same, moved) = ends
    assert own == same
    assert other != moved


def test_a_round_never_travels() -> None:
    """Tasks hold derived seeds only; the round's own seed stays with the server."""
    round = Round(1, 123, {"c": {}}, ("c",), 1.0)
    (task,) = tasks("train", round, {"c": {}})
    assert task.seed != round.seed
    assert "Round" not in {type(v).__name__ for v in vars(task).values()}
