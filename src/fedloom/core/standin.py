"""A client half run on no model: because work is data, it can be answered with stand-ins."""

import torch
from torch import Tensor

from fedloom.core.params import params_map
from fedloom.core.protocols import ClientUpdate, Done, Fit, Payload, Reply, Task, Work


def play(half: ClientUpdate, task: Task, *, noise: float = 0.0) -> Reply:
    """Return the reply of a half whose training moves by `noise` (a standard deviation)."""
    return play_out(half, task, noise=noise)[0]


def play_out(half: ClientUpdate, task: Task, *, noise: float = 0.0) -> tuple[Reply, Payload]:
    """Return the reply and the client state of a half whose training moves by `noise` (a standard deviation)."""
    try:
        work = next(half)
        while True:
            work = half.send(stand_in(work, task.seed, noise=noise))
    except StopIteration as stop:
        result: tuple[Reply, Payload] = stop.value
        return result


def stand_in(work: Work, seed: int, *, noise: float = 0.0) -> Done:
    """Return what a trainer could answer that moves by `noise`."""
    if not isinstance(work, Fit):
        return Done({}, 1, metrics={"loss": 0.0})
    source = torch.Generator().manual_seed(seed)

    def moved(p: Tensor) -> Tensor:
        if not noise or not p.is_floating_point():
            return p.clone()
        return p + noise * torch.randn(p.shape, generator=source, dtype=p.dtype)

    def met(walk: Tensor) -> Tensor:
        return moved(torch.zeros(walk.shape, dtype=torch.float64))

    record = {"scalars": params_map(met, work.walk)} if work.walk else {}
    return Done(params_map(moved, work.start), 1, 1, 1.0, record)
