"""Preferences without a reference model: the preferred answer is learnt, and made likelier than the other.

ORPO: Monolithic Preference Optimization without Reference Model. Hong, Lee, Thorne, EMNLP 2024 (arXiv:2403.07691), the
odds ratio of equations 4 and 7 beside the likelihood. The likelihood is a mean over the tokens of each answer, then over pairs; prompts are not learnt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedloom.objectives.preference import AnswerScore, PairObjective

_LIKELIEST = -1e-9
"""Of a mean log-likelihood, so that the odds stay finite."""


@dataclass(frozen=True, slots=True)
class ORPO(PairObjective):
    """The preferred answer, token by token, and the odds of it beside those of the other."""

    beta: float = 0.1
    """How much the odds count beside the likelihood of the preferred answer: the paper's lambda."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"objective.orpo.beta must be positive, got {self.beta}")

    def pair_losses(self, log_probs: Tensor, references: Tensor, lengths: Tensor) -> Tensor:
        return self.of_means(log_probs / lengths.clamp(min=1))

    def of_means(self, means: Tensor) -> Tensor:
        """Return the losses of pairs, from the mean log-likelihoods (pairs, 2) of their answers' tokens."""
        below = means.clamp(max=_LIKELIEST)
        odds = below - torch.log(-torch.expm1(below))
        return -means[:, 0] - self.beta * functional.logsigmoid(odds[:, 0] - odds[:, 1])

    def reward(self, answer: AnswerScore) -> float:
        """Return beta times the mean log-likelihood of its tokens."""
        return self.beta * answer.log_prob / max(answer.num_tokens, 1)
