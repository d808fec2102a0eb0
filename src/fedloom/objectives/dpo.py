"""Direct preference optimisation: the likelier the preferred answer has become beside the other, the lower the loss.

Direct Preference Optimization: Your Language Model is Secretly a Reward Model. Rafailov, Sharma, Mitchell, Ermon, Manning,
Finn, NeurIPS 2023 (arXiv:2305.18290), equation 7, with label smoothing (cDPO, Mitchell 2023). `ipo`: A General Theoretical
Paradigm to Understand Learning from Human Preferences. Azar et al., AISTATS 2024 (arXiv:2310.12036), equation 17, with
log-likelihoods by token as in its authors' later code. `hinge`: SLiC-HF. Zhao et al. 2023 (arXiv:2305.10425). `robust`:
Provably Robust DPO. Ray Chowdhury, Kini, Natarajan, ICML 2024 (arXiv:2403.00409).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional

from fedloom.objectives.preference import (
    AnswerScore,
    PairObjective,
    Reference,
    check_reference,
)

PairLoss = Literal["sigmoid", "ipo", "hinge", "robust"]


@dataclass(frozen=True, slots=True)
class DPO(PairObjective):
    """Which of two answers is preferred, by their likelihood beside that under a reference model."""

    loss: PairLoss = "sigmoid"
    """Of the margin: sigmoid (the paper's), ipo (squared, by token), hinge, robust (unbiased where labels are noisy)."""
    beta: float = 0.1
    """How much a nat counts; the larger, the closer to the reference model. Of ipo, its tau."""
    label_smoothing: float = 0.0
    """Share of pairs that are believed to be the wrong way round, [0, 0.5): of sigmoid and robust."""
    reference: Reference = "base"
    """The model without what is tuned (base); as the run began (start), which differs where tune is prompt, prefix or
    ptuning; as the client was sent it this round (download). Evaluation compares with the first or second always."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, or would have no effect."""
        if self.loss not in get_args(PairLoss):
            raise ValueError(
                f"objective.dpo.loss must be one of {', '.join(get_args(PairLoss))}, got {self.loss}"
            )
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"objective.dpo.beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"objective.dpo.label_smoothing must be in [0, 0.5), got {self.label_smoothing}"
            )
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            raise ValueError(
                f"objective.dpo.label_smoothing has no effect with loss {self.loss}: it is of sigmoid and robust"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "objective.dpo.label_smoothing must be positive with loss robust, which is sigmoid without it"
            )
        check_reference(self.reference, path="objective.dpo.reference")

    @property
    def least_loss(self) -> float:
        """Return what no loss is below, which of robust is nothing but what is plausible."""
        return -1e6 if self.loss == "robust" else 0.0

    def pair_losses(self, log_probs: Tensor, references: Tensor, lengths: Tensor) -> Tensor:
        drift = log_probs - references
        if self.loss == "ipo":
            drift = drift / lengths.clamp(min=1)
        return self.of_margins(self.beta * (drift[:, 0] - drift[:, 1]))

    def of_margins(self, margins: Tensor) -> Tensor:
        """Return the losses of margins (n,): rewards of chosen answers less those of rejected ones."""
        if self.loss == "ipo":
            return (margins / self.beta - 1 / (2 * self.beta)).square()
        if self.loss == "hinge":
            return functional.relu(1 - margins)
        share = self.label_smoothing
        right, wrong = -functional.logsigmoid(margins), -functional.logsigmoid(-margins)
        if self.loss == "robust":
            return ((1 - share) * right - share * wrong) / (1 - 2 * share)
        return (1 - share) * right + share * wrong

    def reward(self, answer: AnswerScore) -> float:
        """Return beta times its drift, by token where the loss is."""
        return self.beta * answer.drift / (max(answer.num_tokens, 1) if self.loss == "ipo" else 1)
