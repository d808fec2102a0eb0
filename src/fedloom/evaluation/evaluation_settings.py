"""The recipe's `evaluation` section."""

from dataclasses import dataclass
from typing import Literal, get_args

Extract = Literal["text", "number", "first_line", "last_line"]


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """When the clients' held-out data are measured, and how."""

    every: int = 5
    """Rounds between two evaluations; 0: only before the first round and after the last."""
    validation: bool = True
    """Whether the validation split is measured too (loss only, never generated)."""
    generate: bool = True
    """Whether answers to the test split are generated and scored (exact match, ROUGE, chrF); of classes, never."""
    paper_rouge: bool = False
    """Whether answers also get `rouge_l_paper`: ROUGE-L as the package rouge 1.0.1 has it, which the tables of
    FedKSeed and its successors go by."""
    max_new_tokens: int = 64
    """Longest generated answer."""
    batch_size: int = 32
    """Rows in one forward pass, and answers generated at once."""
    max_examples: int | None = None
    """Of each client and split, the first so many; None: all."""
    by: str | None = None
    """A label, such as language: after the last round, test results are also told by its values, and those of
    models that several clients share by model and value."""
    extract: Extract = "text"
    """What exact match compares: the whole text, its number, its first or its last line."""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.every < 0:
            raise ValueError(
                f"evaluation.every must be a number of rounds, or 0 for never, got {self.every}"
            )
        if self.paper_rouge and not self.generate:
            raise ValueError(
                "evaluation.paper_rouge scores generated answers, but evaluation.generate is false"
            )
        if self.max_new_tokens < 1:
            raise ValueError(
                f"evaluation.max_new_tokens must be at least 1, got {self.max_new_tokens}"
            )
        if self.batch_size < 1:
            raise ValueError(f"evaluation.batch_size must be at least 1, got {self.batch_size}")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(
                f"evaluation.max_examples must be at least 1, or null for all, "
                f"got {self.max_examples}"
            )
        if self.extract not in get_args(Extract):
            raise ValueError(
                f"evaluation.extract must be one of {', '.join(get_args(Extract))}, "
                f"got {self.extract!r}"
            )
