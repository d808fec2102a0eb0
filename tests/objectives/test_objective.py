"""Objectives of one's own: through the same trainers and the same evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.client.local_settings import LocalSettings
from fedloom.client.make_trainer import make_trainer
from fedloom.core.protocols import Fit, Job
from fedloom.core.randomness import derive
from fedloom.data.federation import Federation, Shard
from fedloom.data.manifest import Manifest
from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.measure import Evaluator
from fedloom.models.build import Base
from fedloom.objectives.batch import Batch, collate
from fedloom.objectives.forward import Forward
from fedloom.objectives.objective import Objective, Score
from fedloom.objectives.sft import SFT
from fedloom.spaces.lora import LoRA

VOCAB = 64


def answered(prompt: int, answer: int) -> Example:
    """Return a question of four equal tokens and an answer of three."""
    ids = torch.tensor([prompt] * 4 + [answer] * 3)
    labels = ids.clone()
    labels[:4] = IGNORED
    return Example(ids, labels, 4)


def pair(prompt: int, chosen: int, rejected: int) -> Example:
    """Return a question and two answers as one example: two sequences whose positions start anew."""
    both = answered(prompt, chosen), answered(prompt, rejected)
    return Example(
        torch.cat([one.ids for one in both]),
        torch.cat([one.labels for one in both]),
        4,
        positions=torch.cat([torch.arange(7), torch.arange(7)]),
    )


@dataclass(frozen=True, slots=True)
class Pairs(SFT):
    """The chosen answer must be likelier than the rejected one: a row each, a loss a pair."""

    beta: float = 1.0

    def count(self, step: Sequence[Example]) -> int:
        """Return the pairs."""
        return len(step)

    def batch(
        self, lanes: Sequence[Sequence[Example]], counts: Sequence[int], like: Tensor, *, pack: bool
    ) -> Batch:
        """Return two rows a pair, chosen and rejected by turns."""
        rows = [[row for one in step for row in self._rows(one)] for step in lanes]
        return collate(rows, counts, like, pack=False)

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the mean of -log sigmoid(beta margin) over pairs."""
        losses, at = forward.losses(batch)
        likelihood = losses.new_zeros(len(batch.ids)).index_add(0, batch.row_of(at), -losses)
        margin = self.beta * (likelihood[0::2] - likelihood[1::2])
        places = torch.arange(len(margin), device=at.device) * 2 * batch.ids.shape[1]
        asked = (batch.labels[0::2] != IGNORED).any(1)  # rows that fill up a lane ask for nothing
        return batch.per_lane(-torch.nn.functional.logsigmoid(margin) * asked, places)

    def scores(self, forward: Forward, batch: Batch) -> Sequence[Score]:
        """Return whether each chosen answer is the likelier one."""
        rows = SFT.scores(self, forward, batch)
        return [
            Score(one.loss, int(one.loss < two.loss), one.num_tokens, 0)
            for one, two in zip(rows[0::2], rows[1::2], strict=True)
        ]

    def metrics(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """Return how often the chosen answer is the likelier one."""
        loss = sum(score.loss for score in scores) / sum(score.num_tokens for score in scores)
        return {"loss": loss, "accuracy": sum(score.correct for score in scores) / len(scores)}

    def _rows(self, one: Example) -> list[Example]:
        assert one.positions is not None
        second = int((one.positions == 0).nonzero()[1])
        return [
            Example(one.ids[part], one.labels[part], one.prompt_length)
            for part in (slice(0, second), slice(second, None))
        ]


@dataclass(frozen=True, slots=True)
class Doubled(SFT):
    """The loss of SFT twice."""

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return twice the loss."""
        return 2 * SFT.losses(self, forward, batch)


NOTHING = Manifest("", "", "iid", None, 0, 0, 0, 0, 0, 0, {})


class Bench:
    """A trainer of two clients, and its space."""

    def __init__(self, model: Any, rows: Sequence[Example], objective: Objective, **local: Any):
        shards = {"a": Shard(rows, [], rows), "b": Shard(rows[:3], [], rows)}
        federation = Federation(shards, {client: {} for client in shards}, NOTHING)
        base = Base(model.requires_grad_(False), None, "random")
        self.space = LoRA(rank=4).make_space(base, seed=1)
        self.judge = Evaluator(EvaluationSettings(generate=False), None, objective)  # type: ignore[arg-type]
        self.trainer = make_trainer(
            self.space,
            federation,
            LocalSettings(**{"steps": 6, "batch_size": 2, **local}),
            evaluator=self.judge,
            num_rounds=3,
            objective=objective,
        )

    def fit(self) -> Any:
        jobs = [Job(c, 1, derive(3, c), Fit(self.space.start())) for c in ("a", "b")]
        return self.trainer.run(jobs)


@pytest.mark.parametrize(
    "local",
    [{}, {"batched": "off"}, {"kernels": "reference"}, {"accumulation": 2}, {"order": "zeroth"}],
)
def test_a_loss_of_ones_own_goes_through_every_trainer(
    local: Mapping[str, Any], tiny_llama: Callable[..., Any]
) -> None:
    rows = [answered(10 + i, 30 + i) for i in range(5)]
    settings = {"optimizer": "sgd", "max_grad_norm": None, "steps": 1, **local}
    once = Bench(tiny_llama(dtype=torch.float64), rows, SFT(), lr=2e-2, **settings)
    twice = Bench(tiny_llama(dtype=torch.float64), rows, Doubled(), lr=1e-2, **settings)
    for one, two in zip(once.fit(), twice.fit(), strict=True):
        assert two.metrics["loss"] == pytest.approx(2 * one.metrics["loss"])
        for name in one.params:
            torch.testing.assert_close(one.params[name], two.params[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batched", ["auto", "off"])
def test_an_objective_of_pairs_needs_no_trainer_of_its_own(
    batched: str, tiny_llama: Callable[..., Any]
) -> None:
    rows = [pair(10 + i, 30 + i, 45 - i) for i in range(5)]
    bench = Bench(tiny_llama(), rows, Pairs(beta=0.5), lr=2e-2, steps=30, batched=batched)
    model, space = bench.space.model, bench.space
    before = bench.judge.measure(model, rows, split="test")
    done = bench.fit()
    assert done[0].metrics["loss"] < 0.7
    space.load(done[0].params)
    after = bench.judge.measure(model, rows, split="test")
    assert after["accuracy"] == 1.0 > before["accuracy"]


def test_pairs_learn_the_same_in_a_cohort_as_alone(tiny_llama: Callable[..., Any]) -> None:
    rows = [pair(10 + i, 30 + i, 45 - i) for i in range(5)]
    settings = {"optimizer": "sgd", "lr": 0.1, "steps": 3}
    together, alone = (
        Bench(tiny_llama(dtype=torch.float64), rows, Pairs(), batched=batched, **settings).fit()
        for batched in ("auto", "off")
    )
    for one, other in zip(together, alone, strict=True):
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-9)
        for name in one.params:
            torch.testing.assert_close(one.params[name], other.params[name], rtol=1e-6, atol=1e-9)
