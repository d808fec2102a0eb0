"""What each of the processes of `test_ranks.py` runs: `ranks_program.py RANK NUMBER FOLDER`."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import IGNORED, Example
from fedloom.models.build import Base
from fedloom.models.random_llama import random_llama
from fedloom.spaces.full import Full
from fedloom.spaces.lora import LoRA
from fedloom.spaces.sharded import Sharded

# Of neither can two processes have as many rows each.
TUNES: dict[str, Any] = {"lora": LoRA(rank=5, origin="zero"), "full": Full()}
LOCALS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.5, "momentum": 0.5, "accumulation": 2},
}
CASES = [(tune, local) for tune in TUNES for local in LOCALS]
KINDS = ("shards", "replicas")


def federation() -> Federation:
    """Return a client of seven rows of unequal lengths, so that its last batch is too short for all."""
    draw, rows = generator(0, "rows"), []
    for length in (5, 17, 9, 30, 12, 7, 21):
        ids = torch.randint(0, 63, (length,), generator=draw)
        labels = ids.clone()
        labels[: length // 3] = IGNORED
        rows.append(Example(ids, labels, 1))
    manifest = Manifest("", "", "iid", None, 0, 0, 0, 0, 0, 0, {})
    return Federation({"c0": Shard(rows, rows[:2], rows[:2])}, {"c0": {}}, manifest)


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


def results(tune: str, local: str, kind: str) -> list[Any]:
    """Return (params, loss, tokens) of two rounds of each piece of work; kind one is by this process alone."""
    model = random_llama(dtype=torch.float64, vocab=63).requires_grad_(False)
    space: Any = TUNES[tune].make_space(Base(model, None, "random"), seed=1)
    start = space.start()
    settings = LocalSettings(steps=4, batch_size=3, kernels="reference", **LOCALS[local])
    if kind == "shards":
        space = Sharded(space, init_device_mesh("cpu", (dist.get_world_size(),)))
    fast, evaluator = make_fast(model, settings), Any
    make: Any = Sequential if kind == "one" else RankTrainer
    trainer, out = make(Setup(space, federation(), settings, 10), fast, evaluator), list[Any]()
    for work in works(start):
        params = work.start
        for number in (1, 2):
            job = Job("c0", number, derive(number, "c0"), replace(work, start=params))
            (done,) = trainer.run([job])
            params = _shared(done.params) if kind == "shards" else done.params
            out.append((params, done.metrics["loss"], done.metrics["num_tokens"]))
    return out


def _shared(params: Any) -> Any:
    """Return what the first process has to all, as the next round's download is."""
    held = [params]
    dist.broadcast_object_list(held, 0)
    return held[0]


if __name__ == "__main__":
    rank, number, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=number)
    found = {"-".join((kind, *case)): results(*case, kind) for kind in KINDS for case in CASES}
    if rank == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()
