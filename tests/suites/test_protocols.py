"""What models are shown, and how answers are judged: as in the harnesses that tables are made with."""

import pytest

from fedloom.evaluation.generation import cut
from fedloom.suites.items import Choice, Program, Sum
from fedloom.suites.protocols import SUITES, numbers_of, pass_at_k


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is 4 + 3. #### 7", "7", "7"),
        ("#### 1,234", "1234", "1234"),
        ("#### -3", "-3", "-3"),
        ("#### 12.50", "12.50", "12.50"),
        ("#### 7.", "7", "7"),
        ("it costs $5.00", None, "5.00"),
        ("the answer is 7.", None, "7"),
        ("first 3, then 4", None, "4"),
        ("-3", None, "-3"),
        ("no number", None, None),
        ("", None, None),
        ("#### 7 apples and 3 pears", "7", "3"),
        ("1,000,000 people", None, "1000000"),
        ("so ... 8", None, "8"),
        ("####7", None, "7"),
    ],
)
def test_numbers_are_found_strictly_and_flexibly(
    text: str, strict: str | None, flexible: str | None
) -> None:
    assert numbers_of(text) == (strict, flexible)


def test_prompts_are_those_of_the_harnesses() -> None:
    shot = Choice("Two and two?", ("3", "4"), 1, "elementary_sums")
    asked = Choice("One and one?", ("2", "1"), 0, "elementary_sums")
    assert SUITES["mmlu"].prompt(asked, [shot]) == (
        "The following are multiple choice questions (with answers) about elementary sums.\n\n"
        "Two and two?\nA. 3\nB. 4\nAnswer: B\n\nOne and one?\nA. 2\nB. 1\nAnswer:"
    )
    assert SUITES["arc"].prompt(asked, []) == "Question: One and one?\nAnswer:"
    assert SUITES["openbookqa"].prompt(asked, [shot]) == "Two and two? 4\n\nOne and one?"
    passage = Choice("Ice floats.\nQuestion: does ice float?", ("no", "yes"), 1)
    assert SUITES["boolq"].prompt(passage, []) == "Ice floats.\nQuestion: does ice float?\nAnswer:"
    worked = Sum("1 + 1?", "Easy. #### 2")
    assert SUITES["gsm8k"].prompt(Sum("2 + 2?", "#### 4"), [worked]) == (
        "Question: 1 + 1?\nAnswer: Easy. #### 2\n\nQuestion: 2 + 2?\nAnswer:"
    )
    assert SUITES["humaneval"].prompt(Program("def f():\n", "f", ""), []) == "def f():\n"


def test_answers_end_at_the_first_stop() -> None:
    assert cut("    return 1\n\ndef g():\n#", ("\ndef", "\n#")) == "    return 1\n"
    assert cut("whole", ("\ndef",)) == "whole"


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 5) == pytest.approx(0.9166667, abs=1e-6)
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(5, 4, 3) == 1.0
