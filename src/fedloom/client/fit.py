"""Local training, once, for any number of clients side by side."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedloom.client.gradient_transforms import GradientTransforms
from fedloom.client.optimizer import Norms, Optimizer, joint_norms
from fedloom.client.setup import Setup, Step
from fedloom.core.protocols import ClientError, Done, Fit, Job, Params
from fedloom.spaces.live import Tunable


class Lanes(Protocol):
    """The coordinates of several clients, and their gradients."""

    @property
    def values(self) -> Tensor:
        """Return the tuned tensors' values, (lanes, numel); the loop changes them in place."""
        ...

    def gradients(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        """Return (lanes, numel) gradients, the loop's to change, and (lanes,) losses."""
        ...

    def keep(self, lanes: Tensor) -> None:
        """Go on with these lanes only; the others have finished."""
        ...


@dataclass
class _Client:
    """One job on its way."""

    job: Job
    fit: Fit
    stream: Iterator[Step]
    num_examples: int
    num_steps: int
    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def done(self, params: Params, lr: float | None) -> Done:
        """Return the answer, or refuse where nothing was learnt."""
        applied = len(self.losses)
        if self.num_steps and not applied:
            raise ClientError(f"{self.job.client}: no step had a finite loss and gradient")
        skipped = self.num_steps - applied
        metrics = {"num_tokens": float(self.num_tokens), "skipped_steps": float(skipped)}
        if applied:
            metrics["loss"] = math.fsum(self.losses) / applied
        lr_sum = None if lr is None else lr * applied
        return Done(params, self.num_examples, self.num_steps, lr_sum, metrics=metrics)


def fit(
    jobs: Sequence[Job], lanes: Lanes, setup: Setup[Tunable], *, norms: Norms = joint_norms
) -> list[Done]:
    """Run the jobs side by side; `lanes` already stand at their starts. A job leaves when its steps are done.

    A gradient is edited (proximal term, tail, offset, mask), clipped, and given to the optimizer. A lane whose loss or
    gradient is not finite does not move in that step, nor do its moments.
    """
    local, space = setup.local, setup.space
    lr = local.lr_at(jobs[0].round, setup.num_rounds)
    clients = [_client(job, setup) for job in jobs]
    edits = GradientTransforms.of([client.fit for client in clients], space)
    factors = [(client.fit.lr_factor, client.fit.decay_factor) for client in clients]
    optimizer = Optimizer(local, lr, lanes.values, edits.mask, norms, factors)
    linear = local.optimizer == "sgd" and not local.momentum and not local.weight_decay
    out: dict[int, Done] = {}
    active = list(range(len(jobs)))
    for step in range(max(client.num_steps for client in clients) + 1):
        staying = [lane for lane, i in enumerate(active) if clients[i].num_steps > step]
        for lane, i in enumerate(active):
            if clients[i].num_steps == step:
                own = lr * clients[i].fit.lr_factor if linear else None
                out[i] = clients[i].done(space.coordinates(lanes.values[lane]), own)
        if len(staying) < len(active):
            active = [active[lane] for lane in staying]
            if not active:
                break
            index = torch.tensor(staying, device=lanes.values.device)
            for part in (lanes, edits, optimizer):
                part.keep(index)
        _step([clients[i] for i in active], lanes, edits, optimizer)
    return [out[i] for i in range(len(jobs))]


def _client(job: Job, setup: Setup[Tunable]) -> _Client:
    if not isinstance(job.work, Fit):
        raise TypeError(f"{job.client}: only Fit is training, got {type(job.work).__name__}")
    if job.work.seed_sequence is not None or job.work.at_start:
        raise ValueError(
            "seed_sequence and at_start belong to zeroth-order work in seed space: set tune: seeds"
        )
    local, examples = setup.local, setup.examples(job.client)
    num_steps = local.num_steps(len(examples), job.work.steps)
    stream = setup.steps(job, job.work.start, num_steps)
    return _Client(job, job.work, stream, len(examples), num_steps)


def _step(
    clients: Sequence[_Client], lanes: Lanes, edits: GradientTransforms, optimizer: Optimizer
) -> None:
    """Take one optimizer step in every lane."""
    steps = [next(client.stream) for client in clients]
    gradients, losses = lanes.gradients(steps)
    with torch.no_grad():
        edits.apply_(gradients, lanes.values)
        sound = optimizer.step_(lanes.values, gradients, losses)
    for client, taken, loss, good in zip(clients, steps, losses.tolist(), sound, strict=True):
        client.num_tokens += sum(example.num_targets for example in taken)
        if good:
            client.losses.append(loss)
