from collections.abc import Sequence
from typing import Any

import pytest

from fedloom.core.metrics import Metric
from fedloom.evaluation.evaluation_settings import EvaluationSettings


def len_of(answer: str, references: Sequence[str]) -> float:
    return float(len(answer))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"every": -1},
            r"evaluation\.every must be a number of rounds, or 0 for the first and the last alone, got -1",
        ),
        ({"max_new_tokens": 0}, r"evaluation\.max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, r"evaluation\.batch_size must be at least 1, got 0"),
        (
            {"max_examples": 0},
            r"evaluation\.max_examples must be at least 1, or null for all, got 0",
        ),
        ({"clients": 0}, r"evaluation\.clients must be at least 1, or null for all, got 0"),
        (
            {"metrics": ["chrf"], "generate": False},
            r"evaluation\.metrics scores generated answers, but evaluation\.generate is false: leave chrf out",
        ),
        (
            {"metrics": [Metric("own", score=len_of)], "generate": False},
            r"but evaluation\.generate is false: leave own out",
        ),
        (
            {"metrics": []},
            r"evaluation\.metrics scores no answer, but evaluation\.generate is true: set it to false",
        ),
        (
            {"metrics": ["bleu"]},
            r"evaluation\.metrics must be of exact_match, rouge1, .*, or metrics of your own, got 'bleu'",
        ),
        ({"metrics": ["chrf", "chrf"]}, r"must name a metric once, got chrf again"),
        (
            {"metrics": ["chrf", Metric("loss")]},
            r"evaluation\.metrics: the metric loss is one of fedloom's own: call yours otherwise",
        ),
        (
            {"metrics": ["chrf", Metric("own"), Metric("own")]},
            r"evaluation\.metrics: the metric own is given twice",
        ),
        ({"metrics": ["chrf", Metric("a/b")]}, r"a metric's name must be up to 60 letters"),
        (
            {"extract": "json"},
            r"evaluation\.extract must be one of text, number, first_line, last_line, got 'json'",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**given)
