"""A client half run on no model: because work is data, it can be answered with stand-ins."""

import torch
from torch import Tensor

from fedloom.core.params import params_map
from fedloom.core.protocols import ClientUpdate, Done, Fit, Reply, Task, Work


def play(half: ClientUpdate, task: Task, *, noise: float = 0.0) -> Reply:
    """Return the reply of a half whose training moves by `noise` (a standard deviation)."""
    try:
        work = next(half)
        while True:
            work = half.send(_answer(work, task.seed, noise))
    except StopIteration as stop:
        reply: Reply = stop.value[0]
        return reply


def _answer(work: Work, seed: int, noise: float) -> Done:
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
