"""Unequal clients with tiny rows, and trainers over them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.protocols import Fit, Job, Metrics, Params, Split, Trainer
from fedloom.core.randomness import derive
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.scoring import score
from fedloom.models.build import Base
from fedloom.objectives.sft import DEFAULT
from fedloom.spaces.lora import LoRA
from fedloom.spaces.tune import Tune

VOCAB = 64
NOTHING = Manifest("", "", "iid", None, 0, 0, 0, 0, 0, 0, {})


class FakeEvaluator:
    """Answers with the sum of the tuned tensors, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Split]] = []

    def measure_each(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Example]],
        *,
        split: Split,
        share: float = 1.0,
        beside: Sequence[tuple[float, Sequence[float]]] = (),
    ) -> list[Metrics]:
        assert not model.training
        self.asked.append((len(groups), split))
        total = sum(float(p.detach().sum()) for p in model.parameters() if p.requires_grad)
        return [{"loss": total, "num_examples": float(len(group))} for group in groups]

    def drawn(self, examples: Sequence[Example]) -> Sequence[Example]:
        return examples

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        return [found.loss for found in score(model, examples, 8, DEFAULT)]


def _rows(seed: int, count: int, lengths: tuple[int, int] = (6, 14)) -> list[Example]:
    """Return rows that count up, or down where the seed is even; the first two tokens are the prompt."""
    draw = torch.Generator().manual_seed(100 + seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(*lengths, (), generator=draw))
        at = int(torch.randint(0, VOCAB, (), generator=draw))
        ids = (at + (1 if seed % 2 else -1) * torch.arange(length)) % VOCAB
        labels = ids.clone()
        labels[:2] = IGNORED
        out.append(Example(ids, labels, 2))
    return out


def _federation_of(trains: Sequence[Sequence[Example]]) -> Federation:
    """Return clients c0, c1, ... with these training rows and two held-out ones each."""
    shards = {
        f"c{i}": Shard(train, _rows(50 + i, 2), _rows(70 + i, 2)) for i, train in enumerate(trains)
    }
    return Federation(shards, {client: {} for client in shards}, NOTHING)


@pytest.fixture
def federation() -> Federation:
    """Return eight clients of 3 to 17 rows of 6 to 13 tokens."""
    return _federation_of([_rows(i, 3 + 2 * i) for i in range(8)])


@pytest.fixture
def evaluator() -> FakeEvaluator:
    return FakeEvaluator()


class Bench:
    """A trainer and its space."""

    def __init__(self, trainer: Trainer, space: Any) -> None:
        self.trainer, self.space = trainer, space

    def fit(self, clients: Sequence[str], start: Params | None = None, **edits: Any) -> list[Any]:
        """Fit clients from one start, round 1."""
        start = self.space.start() if start is None else start
        jobs = [Job(client, 1, derive(3, client), Fit(start, **edits)) for client in clients]
        return list(self.trainer.run(jobs))


@pytest.fixture
def bench(
    tiny_llama: Callable[..., Any], federation: Federation, evaluator: FakeEvaluator
) -> Callable[..., Bench]:
    """Return a maker: `bench(model=None, data=None, tune={}, num_rounds=10, **local)`, float64 by default.

    A mapping as `tune` is settings of LoRA, of rank 4 where it says no other.
    """

    def make(
        *,
        model: Any = None,
        data: Federation | None = None,
        tune: Tune | Mapping[str, Any] | None = None,
        num_rounds: int = 10,
        **local: Any,
    ) -> Bench:
        model = tiny_llama(dtype=torch.float64) if model is None else model
        base = Base(model.requires_grad_(False), None, "random")
        settings = LocalSettings(**local)
        if tune is None or isinstance(tune, Mapping):
            tune = LoRA(**{"rank": 4, **(tune or {})})
        space: Any = tune.make_space(base, seed=1, decays=settings.decays_seeds)
        trainer = make_trainer(
            space,
            federation if data is None else data,
            settings,
            evaluator=evaluator,
            num_rounds=num_rounds,
        )
        return Bench(trainer, space)

    return make


def _distance(a: Params, b: Params) -> float:
    """Return the largest difference of any entry."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(autouse=True)
def nobody_draws_from_the_global_generator() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[Example]]:
    """Return a maker of training rows: `rows(seed, count, lengths=(6, 14))`."""
    return _rows


@pytest.fixture(scope="session")
def federation_of() -> Callable[..., Federation]:
    """Return a maker of federations from lists of training rows."""
    return _federation_of


@pytest.fixture(scope="session")
def distance() -> Callable[[Params, Params], float]:
    """Return the largest difference of any entry of two Params."""
    return _distance
