"""Answers that are good or bad each by itself: likelier, or less likely, than under a reference model.

KTO: Model Alignment as Prospect Theoretic Optimization. Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela, ICML 2024
(arXiv:2402.01306), its loss. The divergence z0 is estimated by each client's answers to other prompts, as in the paper's code,
where whose answer is taken follows from the batch; here it is that of the client's next example, always.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.core.protocols import Metrics
from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Conversations
from fedloom.data.preferences import mismatched, to_judged
from fedloom.data.readers import Row
from fedloom.data.tokens import Example
from fedloom.objectives.batch import Batch
from fedloom.objectives.forward import Forward
from fedloom.objectives.objective import Score
from fedloom.objectives.preference import (
    AnswerBatch,
    AnswerScore,
    PreferenceObjective,
    PreferenceScore,
    Reference,
    answer_batch,
    check_reference,
    compared,
    mean,
)


@dataclass(frozen=True, slots=True)
class KTO(PreferenceObjective):
    """Whether an answer is good, by its likelihood beside that under a reference model; a pair is a good one and a bad one."""

    beta: float = 0.1
    """How much a nat counts; the larger, the closer to the reference model."""
    good_weight: float = 1.0
    """Of good answers, the paper's lambda_D; with 1 and as many good answers as bad ones both count alike."""
    bad_weight: float = 1.0
    """Of bad answers, lambda_U."""
    reference: Reference = "base"
    """The model without what is tuned (base); as the run began (start), which differs where tune is prompt, prefix or
    ptuning; as the client was sent it this round (download). Evaluation compares with the first or second always."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, value in (
            ("beta", self.beta),
            ("good_weight", self.good_weight),
            ("bad_weight", self.bad_weight),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"objective.kto.{name} must be positive, got {value}")
        check_reference(self.reference, path="objective.kto.reference")

    def records(self, rows: Sequence[Row], settings: DataSettings) -> Conversations:
        """Return the answers that rows judge."""
        return to_judged(rows, settings)

    def joined(self, examples: Sequence[Example], settings: DataSettings) -> list[Example]:
        """Return a client's examples, each with the answer to another prompt that z0 is estimated by."""
        return mismatched(examples, settings.max_length)

    def count(self, step: Sequence[Example]) -> int:
        """Return the answers."""
        return sum(len(example.answers) for example in step)

    def batch(
        self, lanes: Sequence[Sequence[Example]], counts: Sequence[int], like: Tensor, *, pack: bool
    ) -> AnswerBatch:
        """Return a row for each answer, and beside them one for each answer to another prompt."""
        made = PreferenceObjective.batch(self, lanes, counts, like, pack=pack)
        rows = [[row for example in lane for row in example.answers] for lane in lanes]
        others = [[row.mismatched for row in lane if row.mismatched is not None] for lane in rows]
        if not any(others):
            return made
        flat = [row for lane in rows for row in lane]
        places = tuple(at for at, row in enumerate(flat) if row.mismatched is not None)
        other = replace(answer_batch(others, counts, like, pack=pack), places=places)
        return replace(made, mismatched=other)

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the mean loss of the answers of each lane."""
        assert isinstance(batch, AnswerBatch)
        divergences = self._divergences(forward, batch)
        drift = batch.log_probs(forward) - batch.references
        good = torch.tensor([bool(row.good) for row in batch.answers], device=drift.device)
        losses = self.of_drifts(drift, good, divergences[batch.lanes])
        return batch.by_lane(losses, batch.lanes)

    def of_drifts(self, drift: Tensor, good: Tensor, divergence: Tensor) -> Tensor:
        """Return the losses (n,) of answers.

        Args:
            drift: (n,) by how many nats each is likelier than under the reference model.
            good: (n,) bool.
            divergence: (n,) z0 over beta, nats.
        """
        beyond = self.beta * (drift - divergence)
        signed = torch.where(good, beyond, -beyond)
        weights = torch.where(good, self.good_weight, self.bad_weight).to(drift)
        return weights * torch.sigmoid(-signed)

    @torch.no_grad()
    def _divergences(self, forward: Forward, batch: AnswerBatch) -> Tensor:
        """Return z0 over beta of each lane, (lanes,): at least 0, and 0 of a lane without an answer to another prompt."""
        zeros = torch.zeros(len(batch.weights), dtype=torch.float64, device=batch.lanes.device)
        other = batch.mismatched
        if other is None:
            return zeros
        drift = other.log_probs(forward) - other.references
        count = torch.zeros_like(zeros).index_add(0, other.lanes, torch.ones_like(drift))
        return (zeros.index_add(0, other.lanes, drift) / count.clamp(min=1)).clamp(min=0)

    def losses_of(self, examples: Sequence[Sequence[AnswerScore]]) -> list[float]:
        """Return the mean loss of each example's answers, without z0, which is of all together."""
        return [mean(self._losses(answers, 0.0)) for answers in examples]

    def _losses(self, answers: Sequence[AnswerScore], divergence: float) -> list[float]:
        drift = torch.tensor([answer.drift for answer in answers], dtype=torch.float64)
        good = torch.tensor([answer.good for answer in answers])
        found: list[float] = self.of_drifts(
            drift, good, torch.full_like(drift, divergence)
        ).tolist()
        return found

    def reward(self, answer: AnswerScore) -> float:
        """Return beta times its drift."""
        return self.beta * answer.drift

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """Return the mean loss of all answers, with z0 of all of them together, and how they compare."""
        own = [score for score in scores if isinstance(score, PreferenceScore)]
        others = [drift for score in own for drift in score.mismatched]
        answers = [answer for score in own for answer in score.answers]
        losses = self._losses(answers, max(mean(others), 0.0) if others else 0.0)
        measured = {"loss": mean(losses), "num_pairs": float(len(losses))}
        return {**measured, **compared(own, self.reward)}
