from typing import Any

import pytest

from fedloom.evaluation.evaluation_settings import EvaluationSettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": -1}, r"evaluation\.every must be a number of rounds, or 0 for never, got -1"),
        ({"max_new_tokens": 0}, r"evaluation\.max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, r"evaluation\.batch_size must be at least 1, got 0"),
        (
            {"max_examples": 0},
            r"evaluation\.max_examples must be at least 1, or null for all, got 0",
        ),
        (
            {"paper_rouge": True, "generate": False},
            r"evaluation\.paper_rouge scores generated answers, but evaluation\.generate is false",
        ),
        (
            {"extract": "json"},
            r"evaluation\.extract must be one of text, number, first_line, last_line, got 'json'",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**given)
