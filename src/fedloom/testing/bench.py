"""The bench on which algorithms are examined: eight unequal clients, a tiny random model, and rounds on either engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedloom.client.client_state import ClientStateStore
from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.description import describe
from fedloom.core.protocols import (
    Algorithm,
    ClientFailure,
    Done,
    Engine,
    Job,
    Metrics,
    Split,
    Trainer,
)
from fedloom.core.randomness import generator
from fedloom.core.rehearsal import stand_in
from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.preparation import Joining
from fedloom.data.tokens import IGNORED, Example
from fedloom.engines.inprocess import InProcess
from fedloom.evaluation.scoring import evaluating, score
from fedloom.models.build import Base
from fedloom.models.random_llama import random_llama
from fedloom.objectives.objective import Objective
from fedloom.objectives.preference import PreferenceObjective
from fedloom.objectives.selector import Selector
from fedloom.objectives.sft import DEFAULT
from fedloom.rounds.loop import Run, advance, begin
from fedloom.server.samplers import Sampler, Uniform
from fedloom.spaces.live import Live
from fedloom.spaces.lora import LoRA
from fedloom.spaces.seed_space import Seeds, SeedSpace
from fedloom.spaces.tune import Tune

VOCAB = 64
Space = Literal["lora", "seeds"]
SPACES: Mapping[Space, Tune] = {
    "lora": LoRA(rank=4, targets=["q_proj", "v_proj"]),
    "seeds": Seeds(num_seeds=64),
}
LEARNING: Mapping[Space, LocalSettings] = {
    "lora": LocalSettings(optimizer="sgd", lr=0.5, batched="off"),
    "seeds": LocalSettings(optimizer="sgd", lr=1e-2),
}
SEED = 5
"""Of the run, and of whom its sampler draws."""
EMPTY = Manifest("", "", "iid", None, 0, 0, 0, 0, 0, 0, {})


@dataclass
class Bench:
    """A trainer over some clients and what it trains."""

    trainer: Trainer
    space: Live | SeedSpace
    federation: Federation

    def engine(
        self,
        kind: Callable[..., Any],
        algorithm: Algorithm[Any],
        folder: Path,
        *,
        alike: bool = False,
        **extra: Any,
    ) -> Any:
        """Return an engine over the bench's clients.

        Args:
            kind: `InProcess` or `Loopback`.
            algorithm: What it runs.
            folder: Where its clients' states lie.
            alike: Whether their profiles tell none apart.
            **extra: Further fields of the engine.
        """
        clients = {
            c: {"tier": "phone" if i % 3 == 0 and not alike else "desk"}
            | ({} if alike else {"num_examples": str(len(s.train))})
            for i, (c, s) in enumerate(self.federation.shards.items())
        }
        return kind(algorithm, self.trainer, ClientStateStore(folder), clients, **extra)

    def rounds(
        self,
        algorithm: Algorithm[Any],
        engine: Engine,
        count: int,
        *,
        run: Run[Any] | None = None,
        sampler: Sampler | None = None,
        after: Callable[[Run[Any]], object] = lambda _: None,
        min_replies: int = 0,
    ) -> tuple[Run[Any], list[tuple[Metrics, Sequence[ClientFailure]]]]:
        """Run up to round `count`; return the run, and the metrics and failures of each round."""
        run = run or begin(algorithm, self.space.start(), SEED)
        reported = []
        while run.number < count:
            run, metrics, failures = advance(
                run,
                algorithm,
                engine,
                population=engine.population(),
                sampler=sampler or Uniform(SEED),
                min_replies=min_replies,
            )
            reported.append((metrics, failures))
            after(run)
        return run, reported

    def final(
        self, algorithm: Algorithm[Any], folder: Path, count: int = 3, **extra: Any
    ) -> Run[Any]:
        """Return the run after `count` rounds in process."""
        return self.rounds(algorithm, self.engine(InProcess, algorithm, folder), count, **extra)[0]


def make_bench(
    tune: Tune,
    local: LocalSettings,
    *,
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
    num_clients: int = 8,
    objective: Objective = DEFAULT,
) -> Bench:
    """Return clients c0, c1, ... on one model, of which the i-th has 3 + i training examples.

    Args:
        tune: The space they train in.
        local: How they learn.
        dtype: Of the model, and of the tuned coordinates.
        model: Instead of a random Llama.
        num_clients: How many.
        objective: What they learn; one of preferences, from pairs of rows, a selector from questions in both orders.
    """
    model = random_llama(dtype=dtype).requires_grad_(False) if model is None else model
    space = tune.make_space(Base(model, None, "random"), seed=1)
    draw: Callable[[int, int], list[Example]] = rows
    if isinstance(objective, PreferenceObjective):
        draw = partial(rows, paired=True)
    elif isinstance(objective, Selector):
        draw = questions
    made = {
        f"c{i}": [draw(seed, count) for seed, count in ((i, 3 + i), (50 + i, 2), (70 + i, 2))]
        for i in range(num_clients)
    }
    if isinstance(objective, Joining):
        joined = partial(objective.joined, settings=DataSettings())
        made = {client: list(map(joined, splits)) for client, splits in made.items()}
    shards = {client: Shard(*splits) for client, splits in made.items()}
    federation = Federation(shards, {c: {} for c in shards}, EMPTY)
    trainer = make_trainer(
        space,
        federation,
        local,
        evaluator=SumEvaluator(),
        num_rounds=10,
        objective=objective,
    )
    return Bench(trainer, space, federation)


def bench_for(
    algorithm: Algorithm[Any],
    space: Space,
    local: LocalSettings,
    *,
    dtype: torch.dtype = torch.float32,
    num_clients: int = 8,
    objective: Objective = DEFAULT,
) -> Bench:
    """Return a bench in whose space the algorithm can work."""
    tune = SPACES[space]
    factors = algorithm.server_sees == "each in full" or describe(algorithm).multiplies_factors
    if isinstance(tune, LoRA) and factors:
        # Rules that compare or add up LoRA's products need to know the factors.
        tune = replace(tune, origin="zero")
    return make_bench(tune, local, dtype=dtype, num_clients=num_clients, objective=objective)


def rows(seed: int, count: int, *, paired: bool = False) -> list[Example]:
    """Return rows that count up or down, by the parity of the seed; paired with rows that count the other way."""
    draw = torch.Generator().manual_seed(100 + seed)
    out = []
    for _ in range(count):
        length, at = (
            int(torch.randint(low, high, (), generator=draw)) for low, high in ((6, 14), (0, VOCAB))
        )
        ids = (at + (1 if seed % 2 else -1) * torch.arange(length)) % VOCAB
        row = Example(ids, torch.where(torch.arange(length) < 2, IGNORED, ids), 2)
        if paired:
            other = torch.cat([ids[:2], ids[2:].flip(0)])
            labels = torch.where(torch.arange(length) < 2, IGNORED, other)
            row = replace(row, good=True, rejected=Example(other, labels, 2, good=False))
        out.append(row)
    return out


def questions(seed: int, count: int) -> list[Example]:
    """Return questions which of two rows counts up, or by an odd seed down, each in both orders; the answer is 0 or 1."""
    letters = torch.arange(2)
    out = []
    for pair in rows(seed, count, paired=True):
        assert pair.rejected is not None
        sides = [row.ids[2:] for row in pair.answers]
        orders = []
        for answer in (0, 1):
            ids = torch.cat([pair.ids[:2], sides[answer], sides[1 - answer], letters[answer, None]])
            labels = torch.full_like(ids, IGNORED)
            labels[-1] = answer
            orders.append(Example(ids, labels, len(ids) - 1, choices=letters))
        out.append(replace(orders[0], rejected=orders[1]))
    return out


class SumEvaluator:
    """Measures the sum of all weights: enough to tell models apart."""

    def measure_each(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Example]],
        *,
        split: Split,
        share: float = 1.0,
        beside: Sequence[tuple[float, Sequence[float]]] = (),
    ) -> list[Metrics]:
        """Return the sum as every group's loss."""
        total = sum(float(p.detach().double().sum()) for p in model.parameters())
        return [{"loss": total, "num_examples": float(len(g)), "num_tokens": 1.0} for g in groups]

    def drawn(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return all."""
        return examples

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """Return the loss of each example, as it is."""
        with evaluating(model):
            return [found.loss for found in score(model, examples, 8, DEFAULT)]


@dataclass(frozen=True)
class StillTrainer:
    """Trains nothing: what a learning rate of 0 comes to."""

    width: int = 1

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        """Return every start as it is."""
        return [stand_in(job.work, job.seed) for job in jobs]


def drawn_start(space: Live | SeedSpace, seed: int) -> dict[str, torch.Tensor]:
    """Return coordinates none of which is zero, as far from the start as training goes."""
    source = generator(seed, "start")
    return {
        name: t + 0.1 * torch.randn(t.shape, generator=source, dtype=t.dtype)
        for name, t in space.start().items()
    }
