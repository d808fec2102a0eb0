"""A client half run on no model at all: what a reply must look like, and how many bytes it will take.

Because work is data, the server can answer it with stand-ins. The result is the schema an upload is checked against, and
the forecast of `plan`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.client.worker import client_half
from fedloom.core.params import params_map, zeros_like
from fedloom.core.protocols import (
    Algorithm,
    Done,
    Fit,
    Job,
    Payload,
    Refusal,
    Reply,
    Task,
)

Schema = Mapping[tuple[str, str], tuple[torch.dtype, torch.Size]]


@dataclass(frozen=True)
class StandIn:
    """A trainer that moves every coordinate by `noise` and calls it training."""

    noise: float = 0.0
    width: int = 1

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        """Answer without a model."""
        return [self._run(job) for job in jobs]

    def _run(self, job: Job) -> Done:
        if not isinstance(job.work, Fit):
            return Done({}, 1, metrics={"loss": 0.0})
        start, source = job.work.start, torch.Generator().manual_seed(job.seed)

        def moved(p: torch.Tensor) -> torch.Tensor:
            if not self.noise or not p.is_floating_point():
                return p.clone()
            return p + self.noise * torch.randn(p.shape, generator=source, dtype=p.dtype)

        record = {"draws": zeros_like(start), "magnitudes": zeros_like(start)}
        return Done(params_map(moved, start), 1, 1, 1.0, record)


def rehearse(algorithm: Algorithm[Any], task: Task, *, noise: float = 0.0) -> Reply:
    """Return the reply of a client without memory whose training moves by `noise` (a standard deviation)."""
    half, trainer = client_half(algorithm, task, {}), StandIn(noise)
    try:
        work = next(half)
        while True:
            work = half.send(trainer.run([Job(task.client, task.round, task.seed, work)])[0])
    except StopIteration as stop:
        reply: Reply = stop.value[0]
        return reply


def schema(payload: Payload) -> Schema:
    """Return dtype and shape of every tensor."""
    return {
        (group, name): (t.dtype, t.shape)
        for group, params in payload.items()
        for name, t in params.items()
    }


def check(upload: Payload, expected: Schema) -> None:
    """Refuse an upload that is not what was asked for, naming the field.

    Raises:
        Refusal: for a missing, extra or wrongly shaped tensor, and for one that holds NaN or infinity.
    """
    found = schema(upload)
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise Refusal(
                f"upload {'/'.join(key)}: expected {_said(expected.get(key))}, got {_said(found.get(key))}"
            )
    for group, params in upload.items():
        for name, t in params.items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise Refusal(f"upload {group}/{name} is not finite")


def _said(kind: tuple[torch.dtype, torch.Size] | None) -> str:
    return "nothing" if kind is None else f"{str(kind[0]).removeprefix('torch.')} {tuple(kind[1])}"
