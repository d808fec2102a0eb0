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
from fedloom.algorithms.private import Private
from fedloom.client.rehearsal import rehearse
from fedloom.core.protocols import Algorithm, ClientFailure, Reply, Round
from fedloom.core.schema import schema
from fedloom.core.wrapper import layers, stacked
from fedloom.engines.inprocess import InProcess
from fedloom.engines.loopback import Loopback
from fedloom.rounds.checkpoint import Checkpoints, state_sha256
from fedloom.rounds.loop import begin, draw, measure, tasks
from fedloom.server.samplers import Full, Uniform
from fedloom.spaces.seed_space import SeedSpace
from fedloom.wire.wire_settings import WireSettings

Any_ = Algorithm[Any]


def kinds(algorithm: Any) -> set[type]:
    inner = getattr(algorithm, "inner", None)
    return {type(algorithm)} | (kinds(inner) if inner else set())


def test_every_algorithm_of_the_table_is_under_these_laws(cases: dict[str, Any_]) -> None:
    assert set(ALGORITHMS.values()) == set().union(*map(kinds, cases.values()))


def test_both_engines_and_a_resumed_run_end_with_the_same_bytes(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    """A5; the disk from which the run resumes has already seen the rounds that follow."""
    agree(algorithm, WireSettings(), bench, tmp_path)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "ditto(freeze(fedavg))"])
def test_so_they_do_where_the_wire_loses_precision(
    name: str, cases: dict[str, Any_], bench: Callable[..., Any], tmp_path: Path
) -> None:
    agree(cases[name], WireSettings(upload="int8", download="bfloat16"), bench, tmp_path)


def agree(algorithm: Any_, wire: WireSettings, bench: Callable[..., Any], tmp_path: Path) -> None:
    here, there = bench(), bench()
    engine = here.engine(InProcess, algorithm, tmp_path / "a", wire=wire)
    checkpoints = Checkpoints(tmp_path / "c", keep=9)
    a, said_here = here.rounds(algorithm, engine, 4, after=checkpoints.save)
    other = there.engine(Loopback, algorithm, tmp_path / "b", wire=wire)
    b, said_there = there.rounds(algorithm, other, 4)
    assert state_sha256(a) == state_sha256(b)
    assert said_here == said_there, "metrics and bytes too"
    for late in (3, 4):
        (tmp_path / "c" / f"round-{late:06d}.ckpt").unlink()
    middle = checkpoints.load(begin(algorithm, here.space.start(), 5)).run
    assert middle.number == 2
    c, said_again = here.rounds(algorithm, engine, 4, run=middle)
    assert state_sha256(a) == state_sha256(c)
    assert said_again == said_here[2:]
    clients = list(engine.population())
    for kind in ("validate", "test"):
        arguments: Any = {"kind": kind, "clients": clients}
        mine = measure(a, algorithm, engine, population=engine.population(), **arguments)
        yours = measure(b, algorithm, other, population=other.population(), **arguments)
        assert mine == yours


def test_clients_batched_are_clients_one_by_one(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    one = bench(torch.float64, max_grad_norm=0.3)
    many = bench(torch.float64, max_grad_norm=0.3, batched="auto")
    if isinstance(one.space, SeedSpace):
        pytest.skip("walks are taken one client at a time")
    assert many.trainer.width >= 8 > one.trainer.width
    # Noise is bound to the last bit of the sum it covers, in which these differ.
    algorithm = stacked(
        [
            dataclasses.replace(layer, noise_multiplier=0.0)
            if isinstance(layer, Private)
            else layer
            for layer in layers(algorithm)
        ]
    )
    a = one.final(algorithm, tmp_path / "a", sampler=Full())
    b = many.final(algorithm, tmp_path / "b", sampler=Full())
    worst, moved = distance(a.state, b.state)
    assert worst < 1e-12
    assert moved > 1e-3 or type(algorithm) is ALGORITHMS["local"]


def test_the_order_of_clients_does_not_matter(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    class Backwards(Uniform):
        def draw(self, population: Any, seed: int) -> Any:
            return list(reversed(Uniform.draw(self, population, seed)))

    it = bench(torch.float64)
    a = it.final(algorithm, tmp_path / "a", sampler=Uniform(5))
    b = it.final(algorithm, tmp_path / "b", sampler=Backwards(5))
    assert distance(a.state, b.state)[0] < 1e-12, "sums differ by rounding only"


def test_an_uploads_table_is_what_a_rehearsal_says(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    engine = it.engine(InProcess, algorithm, tmp_path)
    run, _ = it.rounds(algorithm, engine, 1)
    round = draw(run, engine.population(), Uniform(3))
    asked = tasks("train", round, algorithm.broadcast(run.state, round))
    for task, delivery in zip(asked, engine.run(asked), strict=True):
        assert isinstance(delivery.answer, Reply)
        assert schema(delivery.answer.upload) == schema(rehearse(algorithm, task, noise=0.1).upload)
        assert delivery.upload_bytes > 0 < delivery.download_bytes


def test_replies_are_what_was_asked_for_whoever_is_drawn(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    """Clients that nothing but their names tells apart, some of whom were there before and some not."""
    it = bench()
    engine = it.engine(InProcess, algorithm, tmp_path, alike=True)
    run, said = it.rounds(algorithm, engine, 6, sampler=Uniform(4))
    assert run.number == 6
    assert [failures for _, failures in said if failures] == []


def test_downloads_are_not_written_to(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    engine = it.engine(InProcess, algorithm, tmp_path)
    run, _ = it.rounds(algorithm, engine, 2)
    round = draw(run, engine.population(), None)
    sent = algorithm.broadcast(run.state, round)
    before = state_sha256({c: dict(p) for c, p in sent.items()})
    for delivery in engine.run(tasks("train", round, sent)):
        assert isinstance(delivery.answer, Reply)
    assert state_sha256({c: dict(p) for c, p in sent.items()}) == before
    assert state_sha256(run) == state_sha256(it.rounds(algorithm, engine, 2, run=run)[0])


def test_lost_clients_are_absences_and_too_few_replies_change_nothing(
    algorithm: Any_, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    engine = it.engine(Loopback, algorithm, tmp_path / "a", lost=frozenset({"c3"}))
    _, said = it.rounds(algorithm, engine, 2, sampler=Full())
    assert [failures for _, failures in said] == [[ClientFailure("c3", "lost on the way")]] * 2
    fresh = begin(algorithm, it.space.start(), 5)
    for lost, least in ((frozenset(f"c{i}" for i in range(8)), 1), (frozenset({"c3"}), 8)):
        engine = it.engine(Loopback, algorithm, tmp_path / f"b{least}", lost=lost)
        run, said = it.rounds(algorithm, engine, 1, sampler=Full(), min_replies=least)
        assert run.number == 1
        assert state_sha256(run.state) == state_sha256(fresh.state)
        assert said[0][0]["comm/round_kept"] == 0


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
    """fs_llm B3: equal numbers of target tokens, plain SGD, one full-batch step."""
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


def distance(a: Any, b: Any) -> tuple[float, float]:
    """Return the largest difference of any two tensors, and the largest entry."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    worst = max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0)
    return worst, max((float(x.abs().max()) for x, _ in pairs if x.numel()), default=0.0)


def tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value.double()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from tensors(value[name])


def test_a_round_never_travels() -> None:
    """Tasks hold derived seeds only; the round's own seed stays with the server."""
    round = Round(1, 123, {"c": {}}, ("c",), 1.0)
    (task,) = tasks("train", round, {"c": {}})
    assert task.seed != round.seed
    assert "Round" not in {type(v).__name__ for v in vars(task).values()}
