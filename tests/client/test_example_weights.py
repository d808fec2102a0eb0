"""Examples that count differently, and what each of them costs."""

import dataclasses
from typing import Any

import pytest
import torch

from fedloom.core.protocols import ClientError, Evaluate, Fit, Job, Losses
from fedloom.data.federation import Federation, Shard

SGD = {"optimizer": "sgd", "lr": 0.1, "steps": 4, "batch_size": 4, "max_grad_norm": None}


@pytest.mark.parametrize("batched", ["off", "auto"])
def test_a_weight_multiplies_the_loss_of_its_example(
    bench: Any, federation: Any, distance: Any, batched: str
) -> None:
    count = len(federation.shards["c3"].train)
    start = {n: t + 0.02 for n, t in bench().space.start().items()}
    plain = bench(batched=batched, **SGD).fit(["c3"], start)[0]
    ones = bench(batched=batched, **SGD).fit(["c3"], start, example_weights=torch.ones(count))[0]
    assert distance(plain.params, ones.params) == 0
    halves = torch.full((count,), 0.5, dtype=torch.float64)
    half = bench(batched=batched, **SGD).fit(["c3"], start, example_weights=halves)[0]
    slow = bench(batched=batched, **{**SGD, "lr": 0.05}).fit(["c3"], start)[0]
    assert distance(half.params, slow.params) < 1e-12
    assert half.metrics["loss"] == pytest.approx(slow.metrics["loss"] / 2, rel=1e-9)


@pytest.mark.parametrize("batched", ["off", "auto"])
def test_examples_of_no_weight_might_as_well_ask_for_nothing(
    bench: Any, federation: Any, distance: Any, batched: str
) -> None:
    shard = federation.shards["c2"]
    weights = torch.tensor([0.0, 1.0] * len(shard.train), dtype=torch.float64)[: len(shard.train)]
    # One batch a step, so that both have the same token count but for what asks for nothing.
    one_step = {**SGD, "steps": 1, "batch_size": len(shard.train)}
    weighed = bench(batched=batched, **one_step).fit(["c2"], example_weights=weights)[0]
    kept = [row for row, w in zip(shard.train, weights.tolist(), strict=True) if w]
    ratio = sum(r.num_targets for r in kept) / sum(r.num_targets for r in shard.train)
    shards = {**federation.shards, "c2": Shard(kept, shard.validation, shard.test)}
    fewer = Federation(shards, federation.profiles, federation.manifest)
    alone = bench(data=fewer, batched=batched, **{**one_step, "lr": 0.1 * ratio}).fit(["c2"])[0]
    # Counts divide once in the loss and once in the rate.
    assert distance(weighed.params, alone.params) < 1e-8
    plain = bench(batched=batched, **one_step).fit(["c2"])[0]
    assert distance(weighed.params, plain.params) > 1e-5


def test_a_batch_of_clients_weighs_each_ones_examples(
    bench: Any, federation: Any, distance: Any
) -> None:
    def fitted(**local: Any) -> list[Any]:
        one, clients = bench(**SGD, **local), ["c1", "c4", "c6"]
        jobs = []
        for at, client in enumerate(clients):
            count = len(federation.shards[client].train)
            draw = torch.Generator().manual_seed(at)
            weights = torch.rand(count, generator=draw, dtype=torch.float64)
            work = dataclasses.replace(_fit(one), example_weights=weights)
            jobs.append(Job(client, 1, at, work))
        return list(one.trainer.run(jobs))

    for alone, together in zip(fitted(batched="off"), fitted(batched="auto"), strict=True):
        assert distance(alone.params, together.params) < 1e-12


def _fit(one: Any) -> Any:
    return Fit({n: t + 0.02 for n, t in one.space.start().items()})


@pytest.mark.parametrize("batched", ["off", "auto"])
def test_losses_are_told_example_by_example(bench: Any, federation: Any, batched: str) -> None:
    one = bench(batched=batched)
    start = {n: t + 0.1 for n, t in one.space.start().items()}
    fits = _fit(one)
    works = [Losses(start), Evaluate(start), fits, Losses(one.space.start())]
    done = one.trainer.run([Job("c2", 1, at, work) for at, work in enumerate(works)])
    rows = federation.shards["c2"].train
    told = done[0].record["losses"]["losses"]
    assert (done[0].params, done[0].num_examples) == ({}, len(rows))
    assert told.dtype == torch.float64
    one.space.load(start)
    with torch.no_grad():
        for row, loss in zip(rows, told.tolist(), strict=True):
            logits = one.space.model(input_ids=row.ids[None]).logits[0]
            wanted = torch.nn.functional.cross_entropy(logits[:-1], row.labels[1:], reduction="sum")
            assert loss == pytest.approx(float(wanted), rel=1e-9)
    assert not torch.equal(told, done[3].record["losses"]["losses"])


def test_answers_that_are_compared_have_no_such_losses(bench: Any, federation: Any) -> None:
    shard = federation.shards["c0"]
    rows = [dataclasses.replace(row, good=True) for row in shard.train]
    data = Federation(
        {"c0": Shard(rows, shard.validation, shard.test)}, {"c0": {}}, federation.manifest
    )
    one = bench(data=data)
    message = "fedem goes by how likely each answer is, which an objective of preferences"
    with pytest.raises(ValueError, match=message):
        one.trainer.run([Job("c0", 1, 0, Losses(one.space.start()))])
    weights = torch.ones(len(rows))
    with pytest.raises(ValueError, match=message):
        one.fit(["c0"], example_weights=weights)


def test_a_client_that_is_not_there_is_refused(bench: Any) -> None:
    one = bench()
    with pytest.raises(ClientError, match="c9 is not among the clients"):
        one.trainer.run([Job("c9", 1, 0, Losses(one.space.start()))])
