"""What clients learn from their data and are judged by: the recipe's section `objective`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedloom.core.protocols import Metrics
from fedloom.data.preparation import Preparation
from fedloom.data.tokens import Example
from fedloom.objectives.batch import Batch, collate
from fedloom.objectives.forward import NOTHING, Forward


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the target tokens of one example."""

    loss: float
    """Sum of the negative log-likelihoods, nats."""
    correct: int
    """Target tokens that are also the most likely ones."""
    num_tokens: int
    choice: int
    """The most likely one for the last target: a place among the choices, or a token; NOTHING where it is none."""


@runtime_checkable
class Objective(Preparation, Protocol):
    """From rows to examples, from examples to batches, from a batch to a loss by lane and to scores.

    A frozen dataclass: its fields are its recipe section. All it knows of the tokenizer is in the examples it makes, so
    that one object serves every client, in training and in evaluation.
    """

    def count(self, step: Sequence[Example]) -> int:
        """Return what the loss of an optimizer step is the mean over: its target tokens, its pairs."""
        ...

    def batch(
        self, lanes: Sequence[Sequence[Example]], counts: Sequence[int], like: Tensor, *, pack: bool
    ) -> Batch:
        """Return rows as tensors; an example may become several rows, such as a pair of answers.

        Args:
            lanes: Examples of each lane.
            counts: What `count` says of each lane's whole step.
            like: A tensor with the device and type of the weights.
            pack: Whether examples may share a row, where that saves work.
        """
        ...

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return each lane's share of its step's mean loss, (lanes,), with a graph."""
        ...

    def scores(self, forward: Forward, batch: Batch) -> Sequence[Score]:
        """Return a score for each example of a batch of one lane that shares no rows."""
        ...

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """Return the metrics of examples together, of which at least one asks for a token."""
        ...


class TokenObjective:
    """What objectives have in common that ask for tokens one by one; a subclass may put its own in the place of a part."""

    __slots__ = ()

    def count(self, step: Sequence[Example]) -> int:
        """Return the target tokens."""
        return sum(example.num_targets for example in step)

    def batch(
        self, lanes: Sequence[Sequence[Example]], counts: Sequence[int], like: Tensor, *, pack: bool
    ) -> Batch:
        """Return a row for each example, or for several."""
        return collate(lanes, counts, like, pack=pack)

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood of the tokens asked for."""
        return batch.per_lane(*forward.losses(batch))

    def scores(self, forward: Forward, batch: Batch) -> Sequence[Score]:
        """Return loss, hits and the last choice of each row."""
        found, num_rows = forward.predictions(batch), len(batch.ids)
        rows = batch.row_of(found.at)
        zeros = torch.zeros(num_rows, dtype=torch.float64, device=rows.device)
        loss = zeros.index_add(0, rows, found.losses).tolist()
        correct = zeros.long().index_add(0, rows, found.hits.long()).tolist()
        count = zeros.long().index_add(0, rows, torch.ones_like(rows)).tolist()
        choices = [NOTHING] * num_rows
        for row, best in zip(rows.tolist(), found.best.tolist(), strict=True):
            choices[row] = best  # places ascend, so the last of a row stays
        return [Score(*one) for one in zip(loss, correct, count, choices, strict=True)]

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """Return loss, perplexity and token accuracy, by token."""
        num_tokens = sum(score.num_tokens for score in scores)
        loss = math.fsum(score.loss for score in scores) / num_tokens
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "token_accuracy": sum(score.correct for score in scores) / num_tokens,
        }


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that is too large for a number."""
    return math.exp(loss) if loss < 700 else loss if math.isnan(loss) else math.inf
