"""What answers to the test split are scored by: the metrics that `evaluation.metrics` names, and users' own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fedloom.core.metrics import QUALITY, Metric, MetricTable, Reduction, Score
from fedloom.evaluation.evaluation_settings import AnswerMetric, EvaluationSettings, Extract
from fedloom.evaluation.text_metrics import chrf, extract, paper_rouge, rouge

Answer = tuple[str, Sequence[str], int]
"""An answer, its references, and the number of its target tokens."""


def answer_metrics(settings: EvaluationSettings, *, written: bool) -> list[Metric]:
    """Return the metrics that score an answer, each with its function.

    Args:
        settings: Of the evaluation.
        written: Whether answers are text; of words among classes only users' own metrics are taken.
    """
    scores = _scores(settings.extract)
    named = [replace(QUALITY[name], score=scores[name]) for name in settings.named if written]
    return [*named, *(metric for metric in settings.own if metric.score)]


def grade(
    metrics: Sequence[Metric], answers: Iterable[Answer], table: MetricTable
) -> dict[str, float]:
    """Return what one client's answers are worth, each metric reduced over them as it says.

    Raises:
        ValueError: where a metric gives no number, or one out of its bounds.
    """
    total = Reduction(table)
    for answer, references, num_tokens in answers:
        scores = {each.name: _scored(each, answer, references) for each in metrics}
        total.add({**scores, "num_tokens": float(num_tokens), "num_examples": 1.0})
    found = total.result()
    for each in metrics:
        if not each.takes(found[each.name]):
            low, high = each.bounds
            raise ValueError(
                f"the metric {each.name} must be in [{low:g}, {high:g}] for every client, got {found[each.name]}:"
                " mend its score, or its bounds"
            )
    return {each.name: found[each.name] for each in metrics}


def _scored(metric: Metric, answer: str, references: Sequence[str]) -> float:
    assert metric.score is not None
    value = metric.score(answer, references)
    if not isinstance(value, int | float):
        raise ValueError(
            f"the score of the metric {metric.name} must be a number, got {type(value).__name__}"
        )
    return float(value)


def _scores(compared: Extract) -> Mapping[AnswerMetric, Score]:
    """Return the functions of the package's own metrics; of several references the best counts."""

    def exact(answer: str, references: Sequence[str]) -> float:
        return float(any(extract(answer, compared) == extract(r, compared) for r in references))

    return {
        "exact_match": exact,
        "rouge1": lambda answer, references: max(rouge(r, answer)[0] for r in references),
        "rougeL": lambda answer, references: max(rouge(r, answer)[1] for r in references),
        "rouge_l_paper": lambda answer, references: max(paper_rouge(r, answer) for r in references),
        "chrf": lambda answer, references: max(chrf(r, answer) for r in references),
    }
