"""Privacy on real trainers, engines and checkpoints: secret, resumable, and what it is without noise."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.private import Private
from fedloom.core.density import Density
from fedloom.engines.inprocess import InProcess
from fedloom.privacy.accountant import Ledger
from fedloom.run.checkpoint import Checkpoints, state_sha256
from fedloom.run.loop import begin
from fedloom.server.samplers import Full, Poisson

FLASC = Flasc(FedAvg(), Density(0.25), Density(0.5))


def test_a_secret_run_resumes_to_the_bit_and_is_never_repeated(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it, algorithm = bench(), Private(FLASC, 0.05, epsilon=2.0, delta=1e-2, rounds=4)
    engine = it.engine(InProcess, algorithm, tmp_path / "a")
    checkpoints = Checkpoints(tmp_path / "c", keep=9)
    whole, said = it.rounds(algorithm, engine, 4, sampler=Poisson(0.4), after=checkpoints.save)
    spent = [metrics["server/epsilon"] for metrics, _ in said]
    assert spent == sorted(spent)
    assert 0.998 * 2 <= spent[-1] <= 2
    for late in (3, 4):
        (tmp_path / "c" / f"round-{late:06d}.ckpt").unlink()
    middle = checkpoints.load(begin(algorithm, it.space.start(), 5)).run
    assert middle.state.mechanism.ledger.num_releases == 2
    again, said_again = it.rounds(algorithm, engine, 4, run=middle, sampler=Poisson(0.4))
    assert state_sha256(again) == state_sha256(whole)
    assert said_again == said[2:]
    ((rate, z, count),) = again.state.mechanism.ledger.releases
    assert (rate, count) == (0.4, 4)
    assert Ledger(((rate, z, 4),)).epsilon(1e-2) == spent[-1]
    other, _ = it.rounds(
        algorithm, it.engine(InProcess, algorithm, tmp_path / "b"), 4, sampler=Poisson(0.4)
    )
    assert state_sha256(other.state.inner) != state_sha256(whole.state.inner)


def test_what_clients_report_of_their_training_does_not_arrive(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it, algorithm = bench(), Private(FLASC, 0.05, noise_multiplier=1.0, quantile=0.5)
    engine = it.engine(InProcess, algorithm, tmp_path)
    _, ((metrics, _),) = it.rounds(algorithm, engine, 1, sampler=Full())
    assert {name.partition("/")[0] for name in metrics} == {"comm", "server"}
    assert metrics["comm/num_replies"] == 8
    assert metrics["server/clip"] == 0.05
    assert 0 < metrics["server/epsilon"] < math.inf


def test_rounds_without_clients_release_noise_and_are_counted(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it, algorithm = bench(), Private(FedAvg(), 0.05, noise_multiplier=1.0)
    engine = it.engine(InProcess, algorithm, tmp_path)
    run, said = it.rounds(algorithm, engine, 3, sampler=Poisson(1e-9))
    assert [metrics["comm/num_replies"] for metrics, _ in said] == [0, 0, 0]
    assert [metrics["comm/round_kept"] for metrics, _ in said] == [1, 1, 1]
    assert run.state.mechanism.ledger == Ledger(((1e-9, 1.0, 3),))
    assert all(bool(t.all()) for t in run.state.inner.params.values())


def test_without_clip_and_noise_it_is_the_uniform_mean(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench(torch.float64)
    inner = FedAvg(weighting="uniform")
    algorithm = Private(inner, math.inf, noise_multiplier=0.0)
    a = it.final(algorithm, tmp_path / "a", sampler=Full()).state.inner.params
    b = it.final(inner, tmp_path / "b", sampler=Full()).state.params
    assert max(float((a[name] - value).abs().max()) for name, value in b.items()) < 1e-15


def test_noise_on_the_support_stays_there_over_rounds(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    """After the first round, when nothing has left the origin, what is not sent never moves."""
    it = bench()
    algorithm = Private(FLASC, 0.05, noise_multiplier=1.0, noise_on="support")
    engine = it.engine(InProcess, algorithm, tmp_path)
    first, _ = it.rounds(algorithm, engine, 1, sampler=Poisson(0.5))
    start = first.state.inner.params
    second, _ = it.rounds(algorithm, engine, 2, run=first, sampler=Poisson(0.5))
    moved = sum(int((value != start[n]).sum()) for n, value in second.state.inner.params.items())
    assert moved == sum(value.numel() for value in start.values()) // 4
