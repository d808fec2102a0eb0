"""What objectives of preferences share: answers as rows of one batch, their log-likelihoods, and what is measured of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedloom.core.protocols import Metrics
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.formats import Conversations, Record
from fedloom.data.preferences import to_pairs, tokenise_answers
from fedloom.data.readers import Row
from fedloom.data.tokens import Example, Tokenised
from fedloom.objectives.batch import Batch, collate
from fedloom.objectives.forward import NOTHING, Forward
from fedloom.objectives.objective import Score

Reference = Literal["base", "start", "download"]
"""The model that answers are compared with: without what is tuned; as the run began; as the client was sent it."""

Reward = Callable[["AnswerScore"], float]
Rewards = np.ndarray[Any, np.dtype[Any]]


def check_reference(reference: str, *, path: str) -> None:
    """Refuse a reference model that is none; `path` is where the recipe has it."""
    if reference not in get_args(Reference):
        *most, last = get_args(Reference)
        raise ValueError(f"{path} must be {', '.join(most)} or {last}, got {reference}")


@runtime_checkable
class Comparing(Protocol):
    """An objective whose loss compares a model with a reference model."""

    @property
    def reference(self) -> Reference:
        """Return which model that is."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerBatch(Batch):
    """Answers of several examples of each lane, whose losses are of whole answers."""

    answers: Sequence[Example] = ()
    """Each row, lane by lane; of a pair the chosen one, then the rejected one."""
    lanes: Tensor = torch.empty(0, dtype=torch.int64)
    """(answers,) int64: the lane of each."""
    sizes: Sequence[int] = ()
    """Answers of each example, lane by lane."""
    mismatched: "AnswerBatch | None" = None
    """The same prompts with answers to others."""
    places: Sequence[int] = ()
    """Of a batch of those: which answer each stands beside."""

    @property
    def lengths(self) -> Tensor:
        """Return the number of target tokens of each answer, (answers,) float64."""
        counts = [row.num_targets for row in self.answers]
        return torch.tensor(counts, dtype=torch.float64).to(self.lanes.device)

    @property
    def references(self) -> Tensor:
        """Return the log-likelihood of each answer under the reference model, (answers,) float64; NaN where it is not known."""
        sums = [
            math.nan if row.reference is None else float(row.reference.double().sum())
            for row in self.answers
        ]
        return torch.tensor(sums, dtype=torch.float64).to(self.lanes.device)

    def token_log_probs(self, forward: Forward) -> list[Tensor]:
        """Return the log-likelihoods of each answer's tokens, (targets,) each, with a graph where one is kept."""
        losses, _ = forward.losses(self)
        assert self.owners is not None
        return [-losses[self.owners == at] for at in range(len(self.answers))]

    def log_probs(self, forward: Forward) -> Tensor:
        """Return the log-likelihood of each answer, (answers,) float64, with a graph."""
        losses, _ = forward.losses(self)
        assert self.owners is not None
        zeros = torch.zeros(len(self.answers), dtype=torch.float64, device=losses.device)
        return zeros.index_add(0, self.owners, -losses.double())

    def drifts(self, forward: Forward) -> dict[int, float]:
        """Return by how many nats each is likelier than under the reference model, by its place."""
        found = [each.double().sum().cpu() for each in self.token_log_probs(forward)]
        drift = torch.stack(found) - self.references.cpu()
        return dict(zip(self.places, drift.tolist(), strict=True))

    def by_lane(self, losses: Tensor, lanes: Tensor) -> Tensor:
        """Return each lane's share, (lanes,), of losses (n,) that are of these lanes (n,)."""
        weighted = losses * self.weights.to(losses.dtype)[lanes]
        return torch.zeros_like(self.weights, dtype=losses.dtype).index_add(0, lanes, weighted)


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What a model makes of one answer."""

    good: bool
    log_prob: float
    """Nats."""
    reference: float
    """Of the reference model; NaN where there is none."""
    divergence: float
    """Sum over its tokens of d^2 / 2, d what the model's log-likelihood is above the reference's.

    An estimate of the divergence of near models (Schulman, Approximating KL Divergence, 2020, k2); unlike exp(d) - 1 - d it does
    not grow with a ratio of likelihoods on answers that neither model wrote."""
    num_tokens: int

    @property
    def drift(self) -> float:
        """Return by how many nats it is likelier than under the reference model."""
        return self.log_prob - self.reference


@dataclass(frozen=True, slots=True)
class PreferenceScore(Score):
    """What a model makes of the answers of one example."""

    answers: Sequence[AnswerScore] = ()
    mismatched: Sequence[float] = ()
    """By how many nats answers to other prompts are likelier than under the reference model."""


class PreferenceObjective(ABC):
    """Learns from answers as wholes, in pairs or one by one; a subclass says by which loss."""

    __slots__ = ()

    @property
    def classes(self) -> Mapping[str, str]:
        """Return nothing: answers are text."""
        return {}

    @property
    def least_loss(self) -> float:
        """Return what no loss is below."""
        return 0.0

    def records(self, rows: Sequence[Row], settings: DataSettings) -> Conversations:
        """Return the pairs that rows hold."""
        return to_pairs(rows, settings)

    def examples(
        self, records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer
    ) -> Tokenised:
        """Return an example of its answers for each record."""
        return tokenise_answers(records, settings, tokenizer)

    def count(self, step: Sequence[Example]) -> int:
        """Return the pairs: each weighs the same, however long its answers are."""
        return len(step)

    def batch(
        self, lanes: Sequence[Sequence[Example]], counts: Sequence[int], like: Tensor, *, pack: bool
    ) -> AnswerBatch:
        """Return a row for each answer."""
        rows = [[row for example in lane for row in example.answers] for lane in lanes]
        sizes = tuple(len(example.answers) for lane in lanes for example in lane)
        return replace(answer_batch(rows, counts, like, pack=pack), sizes=sizes)

    @abstractmethod
    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return each lane's share of its step's mean loss, (lanes,), with a graph."""

    @abstractmethod
    def losses_of(self, examples: Sequence[Sequence[AnswerScore]]) -> list[float]:
        """Return the loss of each example by itself."""

    @abstractmethod
    def reward(self, answer: AnswerScore) -> float:
        """Return what an answer is worth to the model, by which it prefers one to another."""

    @torch.no_grad()
    def scores(self, forward: Forward, batch: Batch) -> Sequence[Score]:
        """Return what the model makes of each example's answers."""
        assert isinstance(batch, AnswerBatch)
        tokens = batch.token_log_probs(forward)
        scored = [score_of(*each) for each in zip(batch.answers, tokens, strict=True)]
        other = batch.mismatched
        beside = {} if other is None else other.drifts(forward)
        examples, drifts = list[list[AnswerScore]](), list[list[float]]()
        at = 0
        for size in batch.sizes:
            examples.append(scored[at : at + size])
            drifts.append([beside[place] for place in range(at, at + size) if place in beside])
            at += size
        return [
            self._score(*each)
            for each in zip(self.losses_of(examples), examples, drifts, strict=True)
        ]

    def _score(
        self, loss: float, answers: Sequence[AnswerScore], mismatched: Sequence[float]
    ) -> PreferenceScore:
        won = len(answers) == 2 and self.reward(answers[0]) > self.reward(answers[1])
        tokens = sum(answer.num_tokens for answer in answers)
        return PreferenceScore(loss, int(won), tokens, NOTHING, answers, mismatched)

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """Return the mean loss, and how the answers compare."""
        loss = mean([score.loss for score in scores])
        own = [score for score in scores if isinstance(score, PreferenceScore)]
        return {"loss": loss, "num_pairs": float(len(scores)), **compared(own, self.reward)}


class PairObjective(PreferenceObjective):
    """Learns which of two answers is preferred."""

    __slots__ = ()

    @abstractmethod
    def pair_losses(self, log_probs: Tensor, references: Tensor, lengths: Tensor) -> Tensor:
        """Return the loss of each pair, (pairs,).

        Args:
            log_probs: (pairs, 2) of the chosen and the rejected answer.
            references: (pairs, 2) likewise of the reference model; NaN where there is none.
            lengths: (pairs, 2) target tokens.
        """

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the mean loss of the pairs of each lane."""
        assert isinstance(batch, AnswerBatch)
        parts = batch.log_probs(forward), batch.references, batch.lengths
        losses = self.pair_losses(*(part.view(-1, 2) for part in parts))
        return batch.by_lane(losses, batch.lanes.view(-1, 2)[:, 0])

    def losses_of(self, examples: Sequence[Sequence[AnswerScore]]) -> list[float]:
        """Return the loss of each pair."""
        rows = [[(a.log_prob, a.reference, a.num_tokens) for a in pair] for pair in examples]
        parts = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        found: list[float] = self.pair_losses(*parts).tolist()
        return found


def answer_batch(
    lanes: Sequence[Sequence[Example]], counts: Sequence[int], like: Tensor, *, pack: bool
) -> AnswerBatch:
    """Return answers as the rows of one batch."""
    # Copies: of equal objects it would not be known which one a token is of.
    rows = [[replace(row, rejected=None, mismatched=None) for row in rows] for rows in lanes]
    made = collate(rows, counts, like, pack=pack, owned=True)
    owner = [lane for lane, some in enumerate(rows) for _ in some]
    return AnswerBatch(
        made.ids,
        made.positions,
        made.labels,
        made.weights,
        made.choices,
        made.owners,
        answers=tuple(row for some in rows for row in some),
        lanes=torch.tensor(owner, dtype=torch.int64, device=like.device),
    )


def score_of(row: Example, log_probs: Tensor) -> AnswerScore:
    """Return what a model with these log-likelihoods (targets,) makes of an answer."""
    tokens = log_probs.double()
    reference, divergence = math.nan, math.nan
    if row.reference is not None:
        before = row.reference.to(tokens)
        reference = float(before.sum())
        divergence = float((tokens - before).square().sum()) / 2
    return AnswerScore(bool(row.good), float(tokens.sum()), reference, divergence, len(tokens))


def prefers(one: float, other: float) -> float:
    """Return 1 where one reward is larger, one half where both are the same."""
    return 0.5 if one == other else float(one > other)


def compared(scores: Sequence[PreferenceScore], reward: Reward) -> dict[str, float]:
    """Return how good answers compare with others: in pairs, or where there are none each with each."""
    good = [a for score in scores for a in score.answers if a.good]
    bad = [a for score in scores for a in score.answers if not a.good]
    pairs = [(s.answers[0], s.answers[1]) for s in scores if len(s.answers) == 2]
    found = _in_pairs(pairs, reward) if pairs else _each_with_each(good, bad, reward)
    if any(math.isnan(answer.reference) for answer in (*good, *bad)):
        return found
    for name, answers in (("chosen_drift", good), ("rejected_drift", bad)):
        if answers:
            found[name] = mean([answer.drift for answer in answers])
    tokens = sum(answer.num_tokens for answer in (*good, *bad))
    total = math.fsum(answer.divergence for answer in (*good, *bad))
    return {**found, "reference_kl": total / max(tokens, 1)}


def _in_pairs(pairs: Sequence[tuple[AnswerScore, AnswerScore]], reward: Reward) -> dict[str, float]:
    wins = [prefers(reward(a), reward(b)) for a, b in pairs]
    taken = math.fsum(
        won * a.num_tokens + (1 - won) * b.num_tokens
        for won, (a, b) in zip(wins, pairs, strict=True)
    )
    both = sum(a.num_tokens + b.num_tokens for a, b in pairs)
    return {
        "preference_accuracy": mean(wins),
        "preference_margin": mean([reward(a) - reward(b) for a, b in pairs]),
        "length_ratio": taken / max(both - taken, 1),
    }


def _each_with_each(
    good: Sequence[AnswerScore], bad: Sequence[AnswerScore], reward: Reward
) -> dict[str, float]:
    """Return the same of every good answer beside every bad one, which may be millions of pairs, from their order."""
    if not good or not bad:
        return {}
    ours, theirs = (np.array([reward(a) for a in some]) for some in (good, bad))
    lengths, others = (np.array([a.num_tokens for a in some]) for some in (good, bad))
    won, lost = _num_below(ours, theirs), _num_below(theirs, ours)
    taken = float(won @ lengths + lost @ others)
    both = float(lengths.sum() * len(bad) + others.sum() * len(good))
    return {
        "preference_accuracy": float(won.sum()) / (len(good) * len(bad)),
        "preference_margin": mean(ours.tolist()) - mean(theirs.tolist()),
        "length_ratio": taken / max(both - taken, 1),
    }


def _num_below(values: Rewards, others: Rewards) -> Rewards:
    """Return how many of the others (m,) each value (n,) is above; an equal one counts one half."""
    ordered = np.sort(others)
    sides: Rewards = np.searchsorted(ordered, values, "left") + np.searchsorted(
        ordered, values, "right"
    )
    return sides / 2


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)
