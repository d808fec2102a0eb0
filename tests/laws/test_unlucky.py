"""A client that fails is a failure, and takes nobody with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import ClientFailure
from fedloom.data.federation import Shard
from fedloom.engines.inprocess import InProcess
from fedloom.server.samplers import Full
from fedloom.wire.wire_settings import WireSettings


def test_a_value_the_wire_cannot_hold_is_the_clients_absence(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench(lr=1e7, max_grad_norm=None, steps=1)
    engine = it.engine(InProcess, FedAvg(), tmp_path, wire=WireSettings(upload="float16"))
    _, ((metrics, failures),) = it.rounds(FedAvg(), engine, 1, sampler=Full())
    assert metrics["comm/num_replies"] + len(failures) == 8
    assert failures
    assert all("float16" in failure.reason for failure in failures)


def test_a_client_whose_update_is_not_finite_is_left_out(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    engine = it.engine(InProcess, FedAvg(), tmp_path)
    honest = it.trainer.run

    def broken(jobs: Any) -> Any:
        done = honest(jobs)
        for job, result in zip(jobs, done, strict=True):
            if job.client == "c2":
                next(iter(result.params.values())).fill_(torch.nan)
        return done

    class Broken:
        width = 1
        run = staticmethod(broken)

    it.trainer = Broken()
    engine = it.engine(InProcess, FedAvg(), tmp_path)
    run, ((metrics, failures),) = it.rounds(FedAvg(), engine, 1, sampler=Full())
    assert [a.client for a in failures] == ["c2"]
    assert "is not finite" in failures[0].reason
    assert metrics["comm/num_replies"] == 7
    assert all(bool(torch.isfinite(p).all()) for p in run.state.params.values())


@pytest.mark.parametrize("batched", ["off", "auto"])
def test_a_client_without_examples_takes_nobody_with_it(
    batched: str, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench(batched=batched)
    it.federation.shards["c2"] = Shard([], [], [])
    engine = it.engine(InProcess, Ditto(FedAvg()), tmp_path)
    _, ((metrics, failures),) = it.rounds(Ditto(FedAvg()), engine, 1, sampler=Full())
    assert failures == [ClientFailure("c2", "c2 has no training examples")]
    assert metrics["comm/num_replies"] == 7


def test_damaged_memory_is_an_absence_that_names_the_file(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    engine = it.engine(InProcess, Ditto(FedAvg()), tmp_path)
    run, _ = it.rounds(Ditto(FedAvg()), engine, 1, sampler=Full())
    file = tmp_path / "c4" / "1"
    file.write_bytes(file.read_bytes()[:-3])
    _, ((_, failures),) = it.rounds(Ditto(FedAvg()), engine, 2, run=run, sampler=Full())
    assert [a.client for a in failures] == ["c4"]
    assert str(file) in failures[0].reason
