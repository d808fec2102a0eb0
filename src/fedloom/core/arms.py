"""Settings that clients try in turns: what came of one, and how likely each is next, by exponentiated gradient (FedEx)."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fedloom.core.protocols import (
    ClientError,
    ClientUpdate,
    Done,
    Evaluate,
    Fit,
    Params,
    Payload,
    Reply,
    Work,
)
from fedloom.core.randomness import generator

Schedule = Literal["adaptive", "aggressive", "decaying", "constant"]
Baseline = Literal["round", "past"]
ScoreKind = Literal["ratio", "difference", "loss"]
_WORST = 10.0
Told = tuple[int, float, float]
"""An arm, the score it came to (lower is better), and on how many examples."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A setting of local training, beside the recipe's."""

    lr: float = 1.0
    """What `local.lr` is multiplied by."""
    weight_decay: float = 1.0
    """What `local.weight_decay` is multiplied by."""
    steps: int | None = None
    """Optimizer steps a round; None: as many as `local` says."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.lr < math.inf:
            raise ValueError(f"fedex.arms: lr must be positive, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"fedex.arms: weight_decay must be >= 0, got {self.weight_decay}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"fedex.arms: steps must be at least 1 or left out, got {self.steps}")

    @property
    def rates(self) -> tuple[float, float]:
        """Return what learning rate and weight decay are multiplied by."""
        return self.lr, self.weight_decay

    def applied(self, work: Work) -> Work:
        """Return training with this setting; steps that the algorithm asks for itself stay."""
        if not isinstance(work, Fit):
            return work
        return replace(
            work,
            lr_factor=work.lr_factor * self.lr,
            decay_factor=work.decay_factor * self.weight_decay,
            steps=self.steps if work.steps is None else work.steps,
        )


def tried(arm: Arm, half: ClientUpdate) -> Generator[Work, Done, tuple[Reply, Payload, Params]]:
    """Run a client half with this setting; return its reply, its client state and what it trained last."""
    after: Params = {}
    try:
        work = next(half)
        while True:
            try:
                done = yield arm.applied(work)
            except ClientError as refusal:
                work = half.throw(refusal)
                continue
            if isinstance(work, Fit):
                after = done.params
            work = half.send(done)
    except StopIteration as stop:
        return (*stop.value, after)


def scored(
    kind: ScoreKind, before: Params, after: Params
) -> Generator[Work, Done, tuple[float, int]]:
    """Measure what came of training; return its score, and on how many examples, none where there are none."""
    try:
        done = yield Evaluate(after)
        loss, was = done.metrics["loss"], 0.0
        if kind != "loss":
            was = (yield Evaluate(before)).metrics["loss"]
    except ClientError:
        return 0.0, 0  # there is no validation data here
    beside = (loss / was if was else math.inf) if kind == "ratio" else loss - was
    return believed(beside), done.num_examples


def believed(score: float) -> float:
    """Return a score within 10 of nothing, so that one client does not decide for all; one that is not finite is 10."""
    return max(-_WORST, min(score, _WORST)) if math.isfinite(score) else _WORST


@dataclass(frozen=True)
class Chances:
    """What is known of the arms."""

    logits: Tensor
    """(arms,) float64, logarithms of their chances."""
    squares: float = 0.0
    """Sum over rounds of the squared largest entry of the gradient."""
    rounds: int = 0
    """In which anybody told a score."""
    score: float = 0.0
    """Discounted sum of the rounds' mean scores."""
    weight: float = 0.0
    """What it is divided by."""

    @classmethod
    def alike(cls, num_arms: int) -> "Chances":
        """Return equal chances."""
        return cls(torch.zeros(num_arms, dtype=torch.float64).log_softmax(0))

    @property
    def entropy(self) -> float:
        """Return the entropy of the chances, nats."""
        return float(-(self.logits.exp() * self.logits).sum())


@dataclass(frozen=True, slots=True)
class ArmRule:
    """How chances follow from scores."""

    step: float | None = None
    """eta_0 of exponentiated gradient; None: the root of twice the logarithm of the number of arms."""
    schedule: Schedule = "aggressive"
    """What eta_0 is divided by: aggressive, the round's own gradient; adaptive, the root of the sum of squared gradients (both
    by the largest entry); decaying, the root of the number of rounds; constant, nothing."""
    baseline: Baseline = "round"
    """What scores are compared with: round, their own mean, so that nothing moves where one arm alone was drawn; past, the
    discounted mean of earlier rounds, as in the paper."""
    discount: float = 0.9
    """gamma, [0, 1]: what a round counts in the mean of past ones, beside the one after it."""
    floor: float = 0.01
    """Share of draws in which all arms are as likely, [0, 1)."""
    settled: float = 0.0
    """Entropy of the chances, in nats, below which the likeliest arm is drawn for good; 0: never."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"fedex.rule.schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}"
            )
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"fedex.rule.baseline must be round or past, got {self.baseline!r}")
        if self.baseline == "round" and self.discount != 0.9:
            raise ValueError(
                f"fedex.rule.discount has no effect with baseline round, got {self.discount}: take baseline past"
            )
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"fedex.rule.step must be positive or left out, got {self.step}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"fedex.rule.discount must be in [0, 1], got {self.discount}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"fedex.rule.floor must be in [0, 1), got {self.floor}")
        if not 0 <= self.settled < math.inf:
            raise ValueError(f"fedex.rule.settled must be >= 0, got {self.settled}")

    def is_settled(self, known: Chances) -> bool:
        """Return whether one arm is drawn for good."""
        return known.entropy < self.settled

    def drawn_by(self, known: Chances) -> Tensor:
        """Return the chances (arms,) float64 that arms are drawn by."""
        if self.is_settled(known):
            return torch.eye(len(known.logits), dtype=torch.float64)[int(known.logits.argmax())]
        return (1 - self.floor) * known.logits.exp() + self.floor / len(known.logits)

    def after(self, known: Chances, told: Sequence[Told]) -> Chances:
        """Return the chances after a round.

        Its own mean is the first round's baseline in any case: beside nothing, whatever was drawn would be made less likely.
        """
        total = math.fsum(weight for *_, weight in told)
        if not total or self.is_settled(known):
            return known
        mean = math.fsum(weight * score for _, score, weight in told) / total
        is_past = self.baseline == "past" and known.weight > 0
        baseline = known.score / known.weight if is_past else mean
        slope = gradient(self.drawn_by(known), told, baseline)
        largest = float(slope.abs().max())
        squares, rounds = known.squares + largest**2, known.rounds + 1
        divisors = {
            "adaptive": squares**0.5,
            "aggressive": largest,
            "decaying": rounds**0.5,
            "constant": 1.0,
        }
        step = math.sqrt(2 * math.log(len(slope))) if self.step is None else self.step
        # Without a gradient there is nothing to divide, and nothing moves.
        logits = stepped(known.logits, slope, step / (divisors[self.schedule] or 1.0))
        score, weight = self.discount * known.score + mean, self.discount * known.weight + 1
        return Chances(logits, squares, rounds, score, weight)


def gradient(chances: Tensor, told: Sequence[Told], baseline: float) -> Tensor:
    """Return an unbiased gradient (arms,) of the expected score: each client's, less the baseline, over its arm's chance.

    Args:
        chances: (arms,) float64 that arms were drawn by.
        told: What came of the clients' arms.
        baseline: What scores are compared with.
    """
    total = math.fsum(weight for *_, weight in told)
    found = torch.zeros_like(chances)
    for arm, score, weight in told:
        found[arm] += weight / total * (score - baseline) / chances[arm]
    return found


def stepped(logits: Tensor, slope: Tensor, step: float) -> Tensor:
    """Return the logarithms (arms,) of chances after a step of exponentiated gradient."""
    return (logits - step * slope).log_softmax(0)


def drawn(chances: Tensor, seed: int) -> int:
    """Return an arm, drawn by chances (arms,) that need not sum to 1."""
    return int(torch.multinomial(chances, 1, generator=generator(seed, "arm")))
