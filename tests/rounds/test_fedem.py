"""FedEM on clients that are mixtures by construction."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedem import FedEM
from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.protocols import Algorithm, Metrics
from fedloom.data.federation import Federation, Shard
from fedloom.data.tokens import IGNORED, Example
from fedloom.engines.inprocess import InProcess
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.measure import Evaluator, combine
from fedloom.models.build import Base
from fedloom.models.random_llama import random_llama
from fedloom.rounds.loop import measure
from fedloom.server.samplers import Full as Everybody
from fedloom.spaces.full import Full
from fedloom.testing.bench import EMPTY, Bench

SHARES = (0.8, 0.8, 0.8, 0.2, 0.2, 0.2)
"""Of the first language, by client."""


def rows(seed: int, count: int, share: float) -> list[Example]:
    """Return rows of four words and what each is in one of two languages, which nothing tells but the answers."""
    draw, made = torch.Generator().manual_seed(seed), []
    for at in range(count):
        word = torch.randint(0, 8, (4,), generator=draw)
        answer = (word + (1 if at < round(share * count) else 4)) % 8
        ids = torch.stack([word + 3, answer + 11], 1).flatten()
        labels = ids.clone()
        labels[::2] = IGNORED
        made.append(Example(ids, labels, 1))
    return made


def measured(algorithm: Algorithm[Any], folder: Path, rounds: int) -> dict[str, Metrics]:
    """Return what clients measure after some rounds."""
    space = Full().make_space(
        Base(random_llama(vocab=19).requires_grad_(False), None, "random"), seed=1
    )
    shards = {
        f"c{i}": Shard(rows(i, 30, share), rows(50 + i, 10, share), rows(70 + i, 30, share))
        for i, share in enumerate(SHARES)
    }
    judged: Any = Evaluator(EvaluationSettings(generate=False), None)  # type: ignore[arg-type]
    local = LocalSettings(optimizer="adamw", lr=5e-3, steps=6, batch_size=10)
    federation = Federation(shards, {client: {} for client in shards}, EMPTY)
    trainer = make_trainer(space, federation, local, evaluator=judged, num_rounds=rounds)
    bench = Bench(trainer, space, federation)
    engine = bench.engine(InProcess, algorithm, folder, alike=True)
    run, _ = bench.rounds(algorithm, engine, rounds, sampler=Everybody())
    everybody = engine.population()
    found, _ = measure(
        run, algorithm, engine, kind="test", population=everybody, clients=list(everybody)
    )
    return dict(found)


@pytest.mark.slow
def test_the_shares_of_a_planted_mixture_are_found_and_one_model_does_worse(tmp_path: Path) -> None:
    ours = measured(FedEM(FedAvg()), tmp_path / "fedem", 12)
    for client, share in zip(ours, SHARES, strict=True):
        found = ours[client]["mixture_1"]
        assert min(abs(found - share), abs(1 - found - share)) < 0.15
        assert ours[client]["mixture_2"] == pytest.approx(1 - found)
    assert (ours["c0"]["mixture_1"] > 0.5) != (ours["c5"]["mixture_1"] > 0.5)
    plain = measured(FedAvg(), tmp_path / "fedavg", 12)
    assert combine(ours.values())["loss"] < 0.6 * combine(plain.values())["loss"]
