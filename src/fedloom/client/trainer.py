"""One client at a time, on any space whose coordinates are the model's own tensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedloom.client.fast.kernels import FastPath
from fedloom.client.fit import fit
from fedloom.client.setup import Setup, Step, check_by_token
from fedloom.core.protocols import Done, Evaluate, Fit, Job, Losses, Metrics, Params, Split
from fedloom.core.randomness import derive, seeded
from fedloom.data.tokens import Example
from fedloom.models.adapters import scaled
from fedloom.spaces.live import Live, Seated


class Loadable(Protocol):
    """What is measured: a model that can be let stand at params."""

    @property
    def model(self) -> nn.Module:
        """Return the model."""
        ...

    def load(self, params: Params) -> None:
        """Let it stand at `params`, in place."""
        ...


S = TypeVar("S", bound=Loadable)


class ClientEvaluator(Protocol):
    """What a trainer needs to answer Evaluate."""

    def measure_each(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Example]],
        *,
        split: Split,
        share: float = 1.0,
        beside: Sequence[tuple[float, Sequence[float]]] = (),
    ) -> Sequence[Metrics]:
        """Return the metrics of each client's examples on one model, or on a mixture of it and others."""
        ...

    def drawn(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return which of them are measured."""
        ...

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> Sequence[float]:
        """Return the loss of each example."""
        ...


class OneLane:
    """The live tensors of the model as a lane of their own: no copy, whatever their size."""

    def __init__(self, space: Seated, fast: FastPath, batch_size: int) -> None:
        self.values = space.values.unsqueeze(0)
        self._fast, self._batch_size = fast, batch_size
        self._gradient = space.gradient_vector().unsqueeze(0)

    def gradients(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        self._gradient.zero_()
        total = torch.zeros_like(self.values[:, 0])
        for batch in self._fast.batches(steps, self._batch_size, self.values):
            losses = self._fast.losses(batch)
            torch.autograd.backward(losses.sum())
            total += losses.detach()
        return self._gradient, total

    def keep(self, lanes: Tensor) -> None:
        """Do nothing: the only lane stays until the end."""


@dataclass(frozen=True)
class OneByOne(ABC, Generic[S]):
    """A trainer that answers jobs in their order: what is to be measured first, then each Fit."""

    setup: Setup[S]
    fast: FastPath
    evaluator: ClientEvaluator
    width: int = 1

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        done = _measured(jobs, self.setup, self.fast, self.evaluator)
        for i, job in enumerate(jobs):
            if isinstance(job.work, Fit):
                done[i] = self.train(job, job.work)
        return [done[i] for i in range(len(jobs))]

    @abstractmethod
    def train(self, job: Job, work: Fit) -> Done:
        """Answer one Fit."""


@dataclass(frozen=True)
class Sequential(OneByOne[Live]):
    """The reference trainer."""

    def train(self, job: Job, work: Fit) -> Done:
        setup = self.setup
        setup.examples(job.client)
        setup.space.load(work.start)
        with (
            training(setup.space.model, job.seed),
            self.fast.installed(),
            scaled(setup.space.model, work.gain),
        ):
            lane = OneLane(setup.space, self.fast, setup.local.rows)
            try:
                return fit([job], lane, setup)[0]
            finally:
                setup.space.drop_gradients()


def _measured(
    jobs: Sequence[Job], setup: Setup[Loadable], fast: FastPath, evaluator: ClientEvaluator
) -> dict[int, Done]:
    """Answer the Evaluate and Losses jobs; the same params are loaded and measured once a split, for all who ask."""
    asked: dict[tuple[Split, int], list[tuple[int, Evaluate]]] = {}
    done = {}
    for i, job in enumerate(jobs):
        if isinstance(job.work, Evaluate):
            # A mixture is a client's own.
            key = job.work.split, id(job.work if job.work.beside else job.work.params)
            asked.setdefault(key, []).append((i, job.work))
        elif isinstance(job.work, Losses):
            rows = setup.examples(job.client)
            check_by_token(rows)
            found = _losses(job.work.params, rows, setup, fast, evaluator)
            losses = torch.tensor(found, dtype=torch.float64)
            done[i] = Done({}, len(rows), record={"losses": {"losses": losses}})
    # Validation before test, whoever asks first.
    for (split, _), same in sorted(asked.items(), key=lambda item: item[0][0] == "test"):
        groups = [setup.examples(jobs[i].client, split) for i, _ in same]
        work = same[0][1]
        flat = [example for group in groups for example in evaluator.drawn(group)]
        beside = [
            (share, _losses(params, flat, setup, fast, evaluator)) for share, params in work.beside
        ]
        setup.space.load(work.params)
        setup.space.model.eval()
        with fast.evaluating():
            measures = evaluator.measure_each(
                setup.space.model, groups, split=split, share=work.share, beside=beside
            )
        for (i, _), group, metrics in zip(same, groups, measures, strict=True):
            done[i] = Done({}, len(group), metrics=metrics)
    return done


def _losses(
    params: Params,
    examples: Sequence[Example],
    setup: Setup[Loadable],
    fast: FastPath,
    evaluator: ClientEvaluator,
) -> Sequence[float]:
    setup.space.load(params)
    setup.space.model.eval()
    with fast.evaluating():
        return evaluator.losses(setup.space.model, examples)


@contextmanager
def training(model: nn.Module, seed: int) -> Iterator[None]:
    """Put the model in training mode; what it draws is from `seed`, and nobody else's numbers move."""
    model.train()
    try:
        with seeded(derive(seed, "dropout")):
            yield
    finally:
        model.eval()
