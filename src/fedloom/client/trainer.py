"""One client at a time, on any space whose coordinates are the model's own tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedloom.client.fast.kernels import FastPath
from fedloom.client.fit import fit
from fedloom.client.objectives import collate
from fedloom.client.setup import Setup, Step
from fedloom.core.protocols import Done, Evaluate, Fit, Job, Metrics, Params, Split
from fedloom.core.seeds import derive
from fedloom.data.tokens import Example
from fedloom.models.parts import has_dropout
from fedloom.models.seeded import seeded
from fedloom.spaces.live import Live


class Evaluator(Protocol):
    """What a trainer needs to answer Evaluate."""

    def measure_each(
        self, model: nn.Module, groups: Sequence[Sequence[Example]], *, split: Split
    ) -> Sequence[Metrics]:
        """Return the metrics of each client's examples on one model."""
        ...


class OneLane:
    """The live tensors of the model as a lane of their own: no copy, whatever their size."""

    def __init__(self, space: Live, fast: FastPath, batch_size: int) -> None:
        self.values = space.values.unsqueeze(0)
        self._loss, self._pack, self._batch_size = fast.loss, fast.packs, batch_size
        self._gradient = space.gradient_vector().unsqueeze(0)

    def gradients(self, steps: Sequence[Step], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        self._gradient.zero_()
        total = torch.zeros_like(self.values[:, 0])
        (step,) = steps
        for at in range(0, len(step), self._batch_size):
            batch = collate(
                [step[at : at + self._batch_size]], counts, self.values, pack=self._pack
            )
            losses = self._loss(batch)
            torch.autograd.backward(losses.sum())
            total += losses.detach()
        return self._gradient, total

    def keep(self, lanes: Tensor) -> None:
        """Do nothing: the only lane stays until the end."""


@dataclass(frozen=True)
class Sequential:
    """The reference trainer."""

    setup: Setup
    fast: FastPath
    evaluator: Evaluator
    width: int = 1

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        done: dict[int, Done] = {}
        for split in ("validation", "test"):
            done |= self._measure(jobs, split)
        for i, job in enumerate(jobs):
            if isinstance(job.work, Fit):
                done[i] = self._train(job, job.work)
        return [done[i] for i in range(len(jobs))]

    def _train(self, job: Job, work: Fit) -> Done:
        setup = self.setup
        setup.examples(job.client)
        setup.space.load(work.start)
        with training(setup.space.model, job.seed), self.fast.installed():
            lane = OneLane(setup.space, self.fast, setup.local.batch_size)
            try:
                return fit([job], lane, setup)[0]
            finally:
                setup.space.drop_gradients()

    def _measure(self, jobs: Sequence[Job], split: Split) -> dict[int, Done]:
        """Answer the Evaluate jobs of a split; the same params are loaded and measured once, for all who ask."""
        asked: dict[int, list[tuple[int, Params]]] = {}
        for i, job in enumerate(jobs):
            if isinstance(job.work, Evaluate) and job.work.split == split:
                asked.setdefault(id(job.work.params), []).append((i, job.work.params))
        done = {}
        for same in asked.values():
            groups = [self.setup.examples(jobs[i].client, split) for i, _ in same]
            self.setup.space.load(same[0][1])
            self.setup.space.model.eval()
            with self.fast.installed():
                measured = self.evaluator.measure_each(self.setup.space.model, groups, split=split)
            for (i, _), group, metrics in zip(same, groups, measured, strict=True):
                done[i] = Done({}, len(group), metrics=metrics)
        return done


@contextmanager
def training(model: nn.Module, seed: int) -> Iterator[None]:
    """Put the model in training mode; its dropout draws from `seed`, and nobody else's numbers move."""
    model.train()
    try:
        if not has_dropout(model):
            yield
            return
        with seeded(derive(seed, "dropout")):
            yield
    finally:
        model.eval()
