"""Algorithms without a model: clients whose losses are parabolas, and a round in ten lines."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.core.protocols import (
    Algorithm,
    ClientId,
    ClientUpdate,
    Done,
    Evaluate,
    Fit,
    Losses,
    Params,
    Payload,
    Reply,
    Round,
    Task,
    Work,
)
from fedloom.core.randomness import derive
from fedloom.core.seed_sequences import COEFFICIENTS, uniform_seeds


@dataclass(frozen=True)
class Parabola:
    """The loss curvature / 2 * (w - center)^2; without curvature a constant gradient, `slope`."""

    center: float = 0.0
    curvature: float = 1.0
    slope: float = 0.0
    num_examples: int = 1

    def value(self, w: Tensor) -> Tensor:
        return self.curvature / 2 * (w - self.center) ** 2 + self.slope * w

    def gradient(self, w: Tensor) -> Tensor:
        return self.curvature * (w - self.center) + self.slope


@dataclass(frozen=True)
class Descent:
    """A trainer: plain gradient descent that honours every field of a Fit."""

    clients: Mapping[ClientId, Parabola]
    lr: float = 0.1
    steps: int = 10
    gradient: bool = True
    """Whether the displacement is told to be a mean gradient."""

    def run(self, client: ClientId, work: Work, seed: int = 0) -> Done:
        loss = self.clients[client]
        if isinstance(work, Fit) and COEFFICIENTS in work.start:
            return self._walk(loss, work, seed)
        if isinstance(work, Losses):
            found = sum(float(loss.value(value).sum()) for value in work.params.values())
            each = torch.full((loss.num_examples,), found, dtype=torch.float64)
            return Done({}, loss.num_examples, record={"losses": {"losses": each}})
        if isinstance(work, Evaluate):
            found = sum(float(loss.value(value).sum()) for value in work.params.values())
            return Done({}, loss.num_examples, metrics={"loss": found})
        weight = 1.0 if work.example_weights is None else float(work.example_weights.mean())
        values = {name: t.clone() for name, t in work.start.items()}
        steps = work.steps or self.steps
        lr = self.lr * work.lr_factor
        for _ in range(steps):
            for name, value in values.items():
                g = weight * loss.gradient(value)
                if work.proximal and name in work.proximal.center:
                    g = g + work.proximal.strength * (value - work.proximal.center[name])
                if work.gradient_offset:
                    g = g + work.gradient_offset[name]
                if work.mask:
                    g = g * work.mask[name]
                values[name] = value - lr * g
        lr_sum = lr * steps if self.gradient else None
        return Done(values, loss.num_examples, steps, lr_sum, metrics={"loss": float(steps)})

    def _walk(self, loss: Parabola, work: Fit, seed: int) -> Done:
        """Follow the exact derivative along one coordinate a step, as a trainer in seed space does."""
        start = work.start[COEFFICIENTS].double()
        steps = work.steps or self.steps
        walk = (
            work.seed_sequence[COEFFICIENTS]
            if work.seed_sequence
            else uniform_seeds(seed, steps, len(start))
        )
        values, scalars = start.clone(), []
        for k in walk.tolist():
            g = loss.gradient((start if work.at_start else values)[k])
            if work.proximal:
                g = g + work.proximal.strength * (values[k] - work.proximal.center[COEFFICIENTS][k])
            if work.mask:
                g = g * work.mask[COEFFICIENTS].expand_as(start)[k]
            scalars.append(g.float().double())
            values[k] -= self.lr * scalars[-1]
        moved = {**work.start, COEFFICIENTS: values}
        record = {"scalars": {COEFFICIENTS: torch.stack(scalars)}}
        lr_sum = self.lr * len(walk) if self.gradient else None
        told = {"loss": float(len(walk))}
        return Done(moved, loss.num_examples, len(walk), lr_sum, record, told)


@dataclass
class World:
    """Some clients, their memories, and the rounds they go through."""

    algorithm: Algorithm[Any]
    trainer: Descent
    state: Any
    memories: dict[ClientId, Payload] = field(default_factory=dict)
    round: Round | None = None
    downloads: Mapping[ClientId, Payload] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    asked: list[Work] = field(default_factory=list)

    def play(self, rounds: int, cohort: Sequence[ClientId] | None = None) -> None:
        population: dict[ClientId, dict[str, str]] = {c: {} for c in self.trainer.clients}
        for _ in range(rounds):
            number = self.round.number + 1 if self.round else 1
            ids = tuple(population if cohort is None else cohort)
            self.round = Round(number, number, population, ids, len(ids) / len(population))
            self.downloads = self.algorithm.broadcast(self.state, self.round)
            self.replies = [self.answer(client) for client in self.downloads]
            self.state, _ = self.algorithm.server_update(self.state, self.round, iter(self.replies))

    def answer(self, client: ClientId) -> Reply:
        assert self.round
        task = Task(
            "train",
            self.round.number,
            client,
            derive(self.round.seed, client),
            self.round.population[client],
            self.downloads[client],
        )
        half = self.algorithm.client_update(task, self.memories.get(client, {}))
        turns = itertools.count()
        reply, self.memories[client], asked = _drive(
            half, lambda work: self.trainer.run(client, work, derive(task.seed, next(turns)))
        )
        self.asked += asked
        return reply

    def deployed(self, client: ClientId) -> Params:
        return self.algorithm.deployed(self.downloads[client], self.memories[client])


def _drive(half: ClientUpdate, answer: Callable[[Work], Done]) -> tuple[Reply, Payload, list[Work]]:
    asked: list[Work] = []
    try:
        work = next(half)
        while True:
            asked.append(work)
            work = half.send(answer(work))
    except StopIteration as stop:
        reply, client_state = stop.value
        return reply, client_state, asked


@pytest.fixture(scope="session")
def drive() -> Callable[..., tuple[Reply, Payload, list[Any]]]:
    """Return `drive(half, answer) -> (reply, client_state, work asked for)`."""
    return _drive


@pytest.fixture(scope="session")
def parabola() -> type[Parabola]:
    """Return the loss of a client."""
    return Parabola


@pytest.fixture(scope="session")
def world() -> Callable[..., World]:
    """Return `world(algorithm, losses, start={"w": 0.0}, lr=.., steps=..)`, in float64."""

    def make(
        algorithm: Algorithm[Any],
        losses: Sequence[Parabola],
        start: Params | None = None,
        **trainer: Any,
    ) -> World:
        clients = {f"c{i}": loss for i, loss in enumerate(losses)}
        params = start or {"w": torch.zeros(1, dtype=torch.float64)}
        return World(algorithm, Descent(clients, **trainer), algorithm.init(params, 0))

    return make


@pytest.fixture(scope="session")
def task() -> Callable[..., Task]:
    """Return `task(params=[1.0, 2.0], ...)`: a training task of round 1 for client c."""

    def make(**groups: Sequence[float]) -> Task:
        download = {name: {"w": torch.tensor(values)} for name, values in groups.items()}
        return Task("train", 1, "c", 0, {}, download)

    return make
