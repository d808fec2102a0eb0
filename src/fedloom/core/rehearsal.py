"""A client half, and the same run on no model at all: what a reply must look like, and how many bytes it will take.

Because work is data, it can be answered with stand-ins. The result is the schema an upload is checked against, and the
forecast of `plan`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedloom.core.description import Mixture, deployed_of, mask_of, mixture_of
from fedloom.core.finetune import NO_FINETUNE, FineTune
from fedloom.core.metrics import FINETUNED, WEIGHTS
from fedloom.core.params import equal, params_map
from fedloom.core.protocols import (
    Algorithm,
    ClientUpdate,
    Done,
    Evaluate,
    Fit,
    Losses,
    Params,
    Payload,
    Reply,
    Task,
    Work,
)


def client_half(algorithm: Algorithm[Any], task: Task, client_state: Payload) -> ClientUpdate:
    """Return the generator that answers the task."""
    return half_of(Deployed(algorithm), task, client_state)


@dataclass
class Deployed:
    """What clients would use: one object, measured once, for those who share a download or its tensors."""

    algorithm: Algorithm[Any]
    finetune: FineTune = NO_FINETUNE
    """What clients do with it before they measure it a second time."""
    _shared: dict[int, tuple[Payload, Params]] = field(default_factory=dict)
    _chosen: dict[tuple[int, ...], Params] = field(default_factory=dict)
    """By its tensors' ids, what those with a client state use: one of several models that all were sent."""

    def of(self, download: Payload, client_state: Payload) -> Params:
        """Return what a client with this client state would use."""
        if client_state:
            params = self.algorithm.deployed(download, client_state)
            return self._chosen.setdefault(tuple(map(id, params.values())), params)
        if id(download) not in self._shared:
            params = self.algorithm.deployed(download, client_state)
            # Downloads may differ beside the model: in what a client alone has to know.
            alike = (known for _, known in self._shared.values() if equal(known, params))
            # The payload is kept beside it: an id is unique only while its object lives.
            self._shared[id(download)] = download, next(alike, params)
        return self._shared[id(download)][1]


def half_of(deployed: Deployed, task: Task, client_state: Payload) -> ClientUpdate:
    """Return the generator that answers the task, a cohort of which measures what is alike once."""
    if task.kind == "train":
        return deployed.algorithm.client_update(task, client_state)
    mixture = mixture_of(deployed.algorithm, task.download, client_state)
    params = deployed.of(task.download, client_state)
    tunes = deployed.finetune.concerns(task)
    fixed = mask_of(deployed.algorithm, task.download) if tunes else None
    return _measure(params, mixture, task, client_state, deployed.finetune, fixed)


def _measure(
    params: Params,
    mixture: Mixture,
    task: Task,
    client_state: Payload,
    finetune: FineTune,
    fixed: Params | None,
) -> ClientUpdate:
    split: Any = "test" if task.kind == "test" else "validation"
    work = Evaluate(params, split)
    if mixture:
        top = deployed_of(mixture)
        beside = [one for at, one in enumerate(mixture) if at != top]
        work = Evaluate(params, split, mixture[top][0], beside)
    done = yield work
    metrics = {
        **done.metrics,
        **{f"mixture_{at}": share for at, (share, _) in enumerate(mixture, 1)},
    }
    if finetune.concerns(task):
        chosen = finetune.mask(params)
        # What only the server writes, such as fedlora's frozen pair, is the server's here too.
        both = params_map(torch.mul, fixed, chosen) if fixed and chosen else chosen or fixed
        tuned = yield Fit(params, mask=both, steps=finetune.steps)
        after = yield Evaluate(tuned.params, split)
        own = {f"{FINETUNED}{n}": v for n, v in after.metrics.items() if n not in WEIGHTS}
        metrics |= own
    return Reply(task.client, {}, done.num_examples, metrics), client_state


def rehearse(
    algorithm: Algorithm[Any], task: Task, *, noise: float = 0.0, num_examples: int = 1
) -> Reply:
    """Return the reply of a client without memory that has so many examples.

    Args:
        algorithm: Any.
        task: Of the client.
        noise: Standard deviation of what its training moves by.
        num_examples: What it says it has.
    """
    half = client_half(algorithm, task, {})
    return play_out(half, task, noise=noise, num_examples=num_examples)[0]


def play(half: ClientUpdate, task: Task, *, noise: float = 0.0) -> Reply:
    """Return the reply of a half whose training moves by `noise` (a standard deviation)."""
    return play_out(half, task, noise=noise)[0]


def play_out(
    half: ClientUpdate, task: Task, *, noise: float = 0.0, num_examples: int = 1
) -> tuple[Reply, Payload]:
    """Return the reply and the client state of a half whose training moves by `noise` (a standard deviation)."""
    try:
        work = next(half)
        while True:
            done = stand_in(work, task.seed, noise=noise)
            work = half.send(replace(done, num_examples=num_examples))
    except StopIteration as stop:
        result: tuple[Reply, Payload] = stop.value
        return result


def stand_in(work: Work, seed: int, *, noise: float = 0.0) -> Done:
    """Return what a trainer could answer that moves by `noise`."""
    if isinstance(work, Losses):
        return Done({}, 1, record={"losses": {"losses": torch.zeros(1, dtype=torch.float64)}})
    if not isinstance(work, Fit):
        return Done({}, 1, metrics={"loss": 0.0})
    source = torch.Generator().manual_seed(seed)

    def moved(p: Tensor) -> Tensor:
        if not noise or not p.is_floating_point():
            return p.clone()
        return p + noise * torch.randn(p.shape, generator=source, dtype=p.dtype)

    def met(sequence: Tensor) -> Tensor:
        return moved(torch.zeros(sequence.shape, dtype=torch.float64))

    record = {"scalars": params_map(met, work.seed_sequence)} if work.seed_sequence else {}
    return Done(params_map(moved, work.start), 1, 1, 1.0, record)
