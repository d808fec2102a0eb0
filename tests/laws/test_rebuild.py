"""A client ends where the server rebuilds it: from scratch, by deltas, in any order of seeds, on any number of threads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.client.zeroth_order import ZerothOrder
from fedloom.core.protocols import Done, Job
from fedloom.core.randomness import generator
from fedloom.core.seed_sequences import widened
from fedloom.engines.inprocess import InProcess
from fedloom.server.samplers import Full
from fedloom.spaces.directions import compiled
from fedloom.spaces.directions.directions import Directions
from fedloom.spaces.directions.stream import Distribution
from fedloom.spaces.seed_space import Seeds

INTEGER: tuple[Distribution, ...] = ("rademacher", "popcount")
DISTRIBUTIONS: tuple[Distribution, ...] = (*INTEGER, "gaussian", "lowrank")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[Done]:
    """Return what walks ended with, as they end."""
    seen: list[Done] = []
    run = ZerothOrder.run

    def watched(self: ZerothOrder, jobs: list[Job]) -> Any:
        done = run(self, jobs)
        seen.extend(done)
        return done

    monkeypatch.setattr(ZerothOrder, "run", watched)
    return seen


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_clients_final_weights_are_the_servers_rebuild(
    distribution: Distribution, bench: Callable[..., Any], ends: list[Done], tmp_path: Path
) -> None:
    """Through whole messages: one client, 50 steps; bit for bit in integer distributions, else 1e-6.

    The server of the next round holds 64 bits of each coefficient, of which clients are sent 32: it is a hair off where
    that client ended, and everybody starts from the same bits.
    """
    tune = Seeds(num_seeds=64, distribution=distribution)
    client, server = (
        bench(tune=tune, lr=1e-3, steps=50, batch_size=2, batched="auto") for _ in range(2)
    )
    for name in [name for name in client.federation.shards if name != "c3"]:
        del client.federation.shards[name]
    algorithm = FedKSeed(steps=50)
    engine = client.engine(InProcess, algorithm, tmp_path)

    def check(run: Any) -> None:
        client.space.load(ends[-1].params)
        server.space.load(run.state.params)
        ended, rebuilt = client.space.values, server.space.values
        if distribution in INTEGER and run.number == 1:
            assert torch.equal(ended, rebuilt)
        assert float((ended - rebuilt).norm() / rebuilt.norm()) <= 1e-6
        assert float((rebuilt - base).norm() / base.norm()) > 1e-3, "it went somewhere"
        sent = widened({n: t.float() for n, t in run.state.params.items()})
        for side in (client, server):
            side.space.load(sent)
        assert torch.equal(client.space.values, server.space.values)

    base = server.space.values.clone()
    client.rounds(algorithm, engine, 3, sampler=Full(), after=check)
    assert len(ends) == 3


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the smallest work be shared out over threads."""
    monkeypatch.setattr(compiled, "_ENOUGH", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SHAPES = {"matrix": torch.Size((130, 90)), "vector": torch.Size((5000,))}


def drawn(size: int, path: str) -> torch.Tensor:
    return torch.randn(size, generator=generator(0, path), dtype=torch.float64)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", INTEGER)
def test_a_rebuild_is_one_whatever_the_order_of_seeds_the_threads_and_the_way(
    distribution: Distribution, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, weights of any type."""
    directions = Directions(SHAPES, distribution=distribution, seed=9)
    base, c = drawn(directions.numel, "base").to(kind), drawn(300, "c") * 1e-2

    def rebuilt() -> torch.Tensor:
        return directions.rebuild(base, c, out=torch.empty_like(base))

    torch.set_num_threads(1)
    scratch = rebuilt()
    for number in (2, 3, 16):
        torch.set_num_threads(number)
        assert torch.equal(rebuilt(), scratch), f"{number} threads"
    grid, quantum = base.double().div(directions.quantum).round(), directions.quantum
    # What holds the sums exactly is moved on from any earlier point, in any number of steps.
    wide = directions.rebuild(grid * quantum, c, out=torch.empty_like(grid))
    there, quanta = grid * quantum, (c / quantum).round()
    for part in (quanta.div(3).floor(), quanta - quanta.div(3).floor()):
        directions.rebuild(there, part * quantum, out=there)
    assert torch.equal(there, wide)
    order = torch.randperm(300, generator=generator(1)).numpy()
    keys_of = Directions._keys
    monkeypatch.setattr(Directions, "_keys", lambda self, ks: keys_of(self, order[np.asarray(ks)]))
    c = c[order]
    assert torch.equal(rebuilt(), scratch), "another order of seeds"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("distribution", ["gaussian", "lowrank"])
def test_a_rebuild_by_deviates_is_one_on_any_threads_and_a_hair_off_in_another_order(
    distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    directions = Directions(SHAPES, distribution=distribution, seed=9)
    base, c = drawn(directions.numel, "base").float(), drawn(300, "c") * 1e-2
    found = []
    for number in (1, 2, 3, 16):
        torch.set_num_threads(number)
        found.append(directions.rebuild(base, c, out=torch.empty_like(base)))
    assert all(torch.equal(one, found[0]) for one in found)
    order = torch.randperm(300, generator=generator(1)).numpy()
    keys_of = Directions._keys
    monkeypatch.setattr(Directions, "_keys", lambda self, ks: keys_of(self, order[np.asarray(ks)]))
    other = directions.rebuild(base, c[order], out=torch.empty_like(base))
    assert float((other - found[0]).norm() / found[0].norm()) <= 1e-6
