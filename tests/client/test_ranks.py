"""Several processes train a client as one does. They are forked: importing torch anew takes longer than all they do."""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fedloom.client.fast.kernels import make_fast
from fedloom.client.local_settings import LocalSettings
from fedloom.client.ranks import RankTrainer
from fedloom.client.setup import Setup
from fedloom.client.trainer import Sequential
from fedloom.core.protocols import Fit, Job, Proximal
from fedloom.core.randomness import derive, generator
from fedloom.models.build import Base
from fedloom.spaces.full import Full
from fedloom.spaces.lora import LoRA
from fedloom.spaces.sharded import Sharded

TUNES = {"lora": LoRA(rank=4, origin="zero"), "full": Full()}
LOCALS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.5, "momentum": 0.5, "accumulation": 2},
}
CASES = [(t, o) for t in TUNES for o in LOCALS]


@pytest.fixture(scope="module")
def results(tiny_llama, federation_of, rows) -> Callable[..., list[Any]]:
    """Return what trains the cases: (params, loss, tokens) of each piece of work."""
    # Unequal rows, and a last batch that is too short for all.
    data = federation_of([rows(1, 7, (5, 30))])

    def run(tune: str, local: str, kind: str) -> list[Any]:
        model = tiny_llama(dtype=torch.float64).requires_grad_(False)
        space: Any = TUNES[tune].make_space(Base(model, None, "random"), seed=1)
        start = space.start()
        settings = LocalSettings(steps=4, batch_size=3, kernels="reference", **LOCALS[local])
        if kind == "shards":
            space = Sharded(space, init_device_mesh("cpu", (dist.get_world_size(),)))
        fast = make_fast(model, settings)
        evaluator: Any = None
        make = Sequential if kind == "one" else RankTrainer
        trainer: Any = make(Setup(space, data, settings, 10), fast, evaluator)
        out = []
        for work in works(start):
            params = work.start
            for number in (1, 2):
                job = Job("c0", number, derive(number, "c0"), replace(work, start=params))
                (done,) = trainer.run([job])
                params = shared(done.params) if kind == "shards" else done.params
                out.append((params, done.metrics["loss"], done.metrics["num_tokens"]))
        return out

    return run


def works(start: Any) -> Iterator[Fit]:
    """Yield what an algorithm may ask for."""
    draw = generator(1, "works")
    noise = {n: 0.1 * torch.randn(t.shape, generator=draw).to(t) for n, t in start.items()}
    yield Fit(start)
    yield Fit(
        {n: t + 0.1 * noise[n] for n, t in start.items()},
        proximal=Proximal(0.3, noise),
        gradient_offset=noise,
        mask={n: (t > 0).to(t) if t.dim() > 1 else torch.tensor(1.0) for n, t in noise.items()},
        steps=2,
    )


def shared(params: Any) -> Any:
    """Return what the first process has to all, as the next round's download is."""
    held = [params]
    dist.broadcast_object_list(held, 0)
    return held[0]


def forked(world: int, folder: Path, work: Callable[[], Any]) -> Any:
    """Return what `work` makes in the first of so many processes."""

    def one(rank: int) -> None:
        meeting = (folder / "meeting").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        found = work()
        if rank == 0:
            torch.save(found, folder / "found")
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return torch.load(folder / "found", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2 shards", "3 shards", "2 replicas"])
def test_several_processes_learn_what_one_does(kind, results, tmp_path, monkeypatch):
    """Two rounds of each case, with clip, decay, pull, offset and mask."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    number, what = kind.split()
    cases = CASES if number == "2" else CASES[1:2]
    by_several = forked(int(number), tmp_path, lambda: [results(*case, what) for case in cases])
    for case, found in zip(cases, by_several, strict=True):
        for own, other in zip(results(*case, "one"), found, strict=True):
            assert other[0].keys() == own[0].keys()
            for name, tensor in own[0].items():
                torch.testing.assert_close(other[0][name], tensor, rtol=0, atol=1e-10)
            assert other[1] == pytest.approx(own[1], abs=1e-12)
            assert other[2] == own[2]
