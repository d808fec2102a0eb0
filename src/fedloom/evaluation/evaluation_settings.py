"""The recipe's `evaluation` section."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from fedloom.core.finetune import FineTune
from fedloom.core.metrics import METRICS, Metric, MetricTable

Extract = Literal["text", "number", "first_line", "last_line"]
AnswerMetric = Literal["exact_match", "rouge1", "rougeL", "rouge_l_paper", "chrf"]
_USUAL = ("exact_match", "rouge1", "rougeL", "chrf")


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """When the clients' held-out data are measured, and how."""

    every: int = 5
    """Rounds between two evaluations; 0: only before the first round and after the last."""
    before: bool = True
    """Whether the model is measured before the first round too; without that nothing says what training brought."""
    validation: bool = True
    """Whether the validation split is measured too (loss only, never generated)."""
    generate: bool = True
    """Whether answers to the test split are generated and scored; of classes, never."""
    metrics: Sequence[str | Metric] = _USUAL
    """What answers are scored by: exact_match, rouge1, rougeL, chrf, rouge_l_paper (ROUGE-L as the package rouge 1.0.1
    has it, which the tables of FedKSeed and its successors go by), and metrics of one's own. One without a score says
    what a number is that an algorithm or a client reports: its title, reduction and direction."""
    max_new_tokens: int = 64
    """Longest generated answer."""
    batch_size: int = 32
    """Answers generated at once, and the most rows in one forward pass; on a CPU fewer where rows are long."""
    max_examples: int | None = None
    """Of each client and split, drawn with data.seed and the same for every baseline and round; None: all."""
    clients: int | None = None
    """How many clients an evaluation measures, drawn anew for each from those with held-out data and the same for
    every baseline; None: all. `fedloom evaluate` measures all in any case."""
    by: str | None = None
    """A label, such as language: after the last round, test results are also told by its values, and those of
    models that several clients share by model and value."""
    finetune: FineTune = FineTune()
    """What each client does with the model it was sent before its test rows are measured a second time."""
    extract: Extract = "text"
    """What exact match compares: the whole text, its number, its first or its last line."""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.every < 0:
            raise ValueError(
                f"evaluation.every must be a number of rounds, or 0 for the first and the last alone, got {self.every}"
            )
        self._check_metrics()
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
        if self.clients is not None and self.clients < 1:
            raise ValueError(
                f"evaluation.clients must be at least 1, or null for all, got {self.clients}"
            )
        if self.extract not in get_args(Extract):
            raise ValueError(
                f"evaluation.extract must be one of {', '.join(get_args(Extract))}, "
                f"got {self.extract!r}"
            )

    @property
    def named(self) -> tuple[AnswerMetric, ...]:
        """Return which of the package's own metrics score answers."""
        return tuple(cast(AnswerMetric, name) for name in self.metrics if isinstance(name, str))

    @property
    def own(self) -> tuple[Metric, ...]:
        """Return the metrics of users' own."""
        return tuple(metric for metric in self.metrics if isinstance(metric, Metric))

    @property
    def table(self) -> MetricTable:
        """Return all metrics that there are."""
        return METRICS.extended(self.own)

    def _check_metrics(self) -> None:
        known = get_args(AnswerMetric)
        for name in self.named:
            if name not in known:
                raise ValueError(
                    f"evaluation.metrics must be of {', '.join(known)}, or metrics of your own, got {name!r}"
                )
            if self.named.count(name) > 1:
                raise ValueError(f"evaluation.metrics must name a metric once, got {name} again")
        try:
            scored = [metric.name for metric in self.table.own.values() if metric.score]
        except ValueError as error:
            raise ValueError(f"evaluation.metrics: {error}") from error
        if not self.generate and (scored or self.named != _USUAL):
            given = ", ".join([*self.named, *scored]) or "none"
            raise ValueError(
                f"evaluation.metrics scores generated answers, but evaluation.generate is false: leave {given} out"
            )
        if self.generate and not (scored or self.named):
            raise ValueError(
                "evaluation.metrics scores no answer, but evaluation.generate is true: set it to false, or name a"
                f" metric ({', '.join(known)})"
            )
