"""FedKSeed on real models: FedAvg to the bit, and a plain loop of FedAvg over MeZO to a hair."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.client.setup import batches
from fedloom.core.payloads import to_all
from fedloom.core.protocols import ClientId, ClientUpdate, Payload, Round, Task
from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS, uniform_seeds, widened
from fedloom.data.tokens import IGNORED
from fedloom.engines.inprocess import InProcess
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.loop import begin, draw, measure
from fedloom.server.importance import Pro
from fedloom.server.samplers import Full, Uniform
from fedloom.spaces.seed_space import Seeds

EPS, LR, STEPS, VOCAB = 5e-4, 2e-3, 8, 64
SEEDS = Seeds(num_seeds=32)
LOCAL: dict[str, Any] = {"lr": LR, "steps": STEPS, "batched": "auto", "batch_size": 4}


class FedAvgInFloat32(FedAvg):
    """FedAvg that sends what FedKSeed sends."""

    def broadcast(self, state: Any, round: Round) -> Mapping[ClientId, Payload]:
        return to_all(round, {"params": {n: t.float() for n, t in state.params.items()}})

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        wide = {"params": widened(task.download["params"])}
        return FedAvg.client_update(self, replace(task, download=wide), client_state)


def test_sending_vectors_fedkseed_is_fedavg_in_seed_space_to_the_bit(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    """Their walks are one: that of a task's first piece of work."""
    it, few = bench(tune=SEEDS, **LOCAL), Uniform(2)
    ours = it.final(FedKSeed(steps=STEPS, uploads="delta"), tmp_path / "a", sampler=few).state
    theirs = it.final(FedAvgInFloat32(), tmp_path / "b", sampler=few).state
    assert torch.equal(ours.params[COEFFICIENTS], theirs.params[COEFFICIENTS])
    assert float(ours.params[COEFFICIENTS].abs().max()) > 1e-4


def test_scalars_say_what_vectors_say(bench: Callable[..., Any], tmp_path: Path) -> None:
    it = bench(tune=SEEDS, **LOCAL)
    ends = []
    for uploads in ("scalars", "delta"):
        algorithm = FedKSeed(steps=STEPS, uploads=uploads)
        end = it.final(algorithm, tmp_path / uploads, sampler=Uniform(2))
        ends.append(end.state.params[COEFFICIENTS])
    # One float32 rounding of what is sent in round 2 and 3 may fall the other way.
    assert float((ends[0] - ends[1]).abs().max()) < 1e-5 * float(ends[1].abs().max())


def loss_of(model: Any, rows: Any) -> float:
    """Return the mean loss of rows in one padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence([r.ids for r in rows], batch_first=True)
    labels = torch.full_like(ids, IGNORED)
    for row, example in zip(labels, rows, strict=True):
        row[: len(example.ids) - 1] = example.labels[1:]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    return float(F.cross_entropy(logits, labels.flatten()))


def reference(bench: Any, rounds: int, *, lr: float, steps: int) -> list[float]:
    """Return the losses of FedAvg over MeZO-SGD as a plain loop, which shares seeds, data and directions only."""
    model, shards, space = bench.space.model, bench.federation.shards, bench.space
    named = {n: p for n, p in model.named_parameters() if n in space.directions.shapes}

    @cache
    def z(k: int) -> dict[str, torch.Tensor]:
        return {n: space.directions.z(n, k).to(p).view_as(p) for n, p in named.items()}

    def loss(values: Mapping[str, torch.Tensor], rows: Any) -> float:
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(values[n])
        return loss_of(model, rows)

    w = {n: p.detach().clone() for n, p in named.items()}
    everything = [row for shard in shards.values() for row in shard.train]
    losses = [loss(w, everything)]
    for number in range(1, rounds + 1):
        seed, mean, total = derive(5, "round", number), {n: 0 * t for n, t in w.items()}, 0
        for client, shard in shards.items():
            values = {n: t.clone() for n, t in w.items()}
            job = derive(derive(seed, client), 0)
            stream = batches(shard.train, 4, job)
            for k in uniform_seeds(job, steps, space.num_seeds).tolist():
                rows = next(stream)
                ahead = loss({n: t + EPS * z(k)[n] for n, t in values.items()}, rows)
                behind = loss({n: t - EPS * z(k)[n] for n, t in values.items()}, rows)
                g = (ahead - behind) / (2 * EPS)
                values = {n: t - lr * g * z(k)[n] for n, t in values.items()}
            total += len(shard.train)
            for n in w:
                mean[n] += len(shard.train) * values[n]
        w = {n: t / total for n, t in mean.items()}
        losses.append(loss(w, everything))
    return losses


def ours(
    bench: Any, rounds: int, folder: Path, *, algorithm: FedKSeed, seed: int = 5
) -> list[float]:
    """Return the losses of FedKSeed, of the model rebuilt after every round."""
    engine = bench.engine(InProcess, algorithm, folder)
    rows = [row for shard in bench.federation.shards.values() for row in shard.train]
    found = [loss_of(bench.space.model, rows)]

    def note(run: Any) -> None:
        bench.space.load(run.state.params)
        found.append(loss_of(bench.space.model, rows))

    run = begin(algorithm, bench.space.start(), seed)
    bench.rounds(algorithm, engine, rounds, run=run, sampler=Full(), after=note)
    return found


@pytest.fixture(scope="module")
def taught(tiny_llama: Callable[..., Any]) -> nn.Module:
    """Return a model that counts up, as three clients of five do: the others have something to teach it."""
    model: nn.Module = tiny_llama()
    ids = (torch.arange(VOCAB)[:, None] + torch.arange(12)) % VOCAB
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.fixture
def five(bench: Callable[..., Any], taught: nn.Module) -> Callable[..., Any]:
    """Return a maker of places where five clients of 4 to 10 rows tune the taught model: `five(**tune)`."""

    def make(**tune: Any) -> Any:
        local = {**LOCAL, "lr": 1e-3, "steps": 4}
        place = bench(tune=replace(SEEDS, **tune), model=deepcopy(taught), **local)
        for client in ("c0", "c2", "c5"):
            del place.federation.shards[client]
        return place

    return make


Curves = Callable[..., tuple[list[float], list[float]]]


@pytest.fixture
def curves(five: Callable[..., Any], tmp_path: Path) -> Curves:
    """Return `curves(rounds, **tune)`: the losses of FedKSeed and of the plain loop, 4 steps a round and client."""

    def play(rounds: int, **tune: Any) -> tuple[list[float], list[float]]:
        found = ours(five(**tune), rounds, tmp_path, algorithm=FedKSeed(steps=4))
        return found, reference(five(**tune), rounds, lr=1e-3, steps=4)

    return play


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_it_learns_as_a_plain_loop_of_fedavg_over_mezo_does(
    distribution: str, curves: Curves
) -> None:
    """Five clients, six rounds, within 1 % after every one; the loss falls by a tenth at least."""
    found, expected = curves(6, distribution=distribution, num_seeds=256)
    assert found == pytest.approx(expected, rel=0.01)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [64, 1024, 4096])
def test_over_thirty_rounds_it_follows_the_plain_loop_within_a_percent(
    num_seeds: int, curves: Curves
) -> None:
    """The loss falls by a quarter at least, whatever the number of directions."""
    found, expected = curves(30, num_seeds=num_seeds)
    assert len(found) == 31
    assert found == pytest.approx(expected, rel=0.01)
    assert found[-1] < 0.75 * found[0]


@pytest.mark.slow
def test_pro_learns_as_uniform_draws_do(five: Callable[..., Any], tmp_path: Path) -> None:
    """Over five seeds not worse by two standard deviations."""
    ends: dict[str, list[float]] = {"uniform": [], "pro": []}
    for seed in range(5):
        for name, algorithm in (
            ("uniform", FedKSeed(steps=4)),
            ("pro", FedKSeed(steps=4, sampling=Pro())),
        ):
            folder = tmp_path / f"{name}-{seed}"
            ends[name].append(
                ours(five(num_seeds=64), 8, folder, algorithm=algorithm, seed=seed)[-1]
            )
    assert mean(ends["pro"]) <= mean(ends["uniform"]) + 2 * stdev(ends["uniform"]), ends


def test_clients_with_walks_of_their_own_still_use_one_model(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    """Pro's downloads differ by client; what is deployed does not."""
    from fedloom.core.rehearsal import Deployed

    it, algorithm = bench(tune=SEEDS, **LOCAL), FedKSeed(steps=STEPS, sampling=Pro())
    engine = it.engine(InProcess, algorithm, tmp_path)
    run, _ = it.rounds(algorithm, engine, 1, sampler=Uniform(2))
    sent = algorithm.broadcast(run.state, draw(run, engine.population(), None))
    deployed = Deployed(algorithm)
    assert len({id(payload) for payload in sent.values()}) == 8
    assert len({id(deployed.of(payload, {})) for payload in sent.values()}) == 1
    population = engine.population()
    measured, _ = measure(
        run, algorithm, engine, kind="test", population=population, clients=list(population)
    )
    assert len({metrics["loss"] for metrics in measured.values()}) == 1


def test_scalars_of_a_run_with_weight_decay_are_refused(bench: Callable[..., Any]) -> None:
    it = bench(tune=SEEDS, **LOCAL)
    start = {**it.space.start(), "base": torch.zeros((), dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"uploads must be delta for local\.weight_decay"):
        begin(FedKSeed(), start, 5)
    assert state_sha256(begin(FedKSeed(uploads="delta"), start, 5))
