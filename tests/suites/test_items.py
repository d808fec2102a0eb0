"""Items from files of every form they come in, and what is none."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedloom.suites.items import Choice, Sum, choice, gsm8k, read_items


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": " Two and two? ", "subject": "sums", "choices": ["3", "4"], "answer": 1},
            Choice("Two and two?", ("3", "4"), 1, "sums"),
        ),
        (
            {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
            Choice("Q", ("a", "b"), 1),
        ),
        (
            {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
            Choice("Q", ("a", "b"), 0),
        ),
        ({"question": "Q", "choices": "['x', 'y']", "answer": "B"}, Choice("Q", ("x", "y"), 1)),
        (
            {"passage": "Ice floats.", "question": "does ice float", "answer": True},
            Choice("Ice floats.\nQuestion: does ice float?", ("no", "yes"), 1),
        ),
        (
            {
                "activity_label": "Skating",
                "ctx_a": "She falls.",
                "ctx_b": "she",
                "endings": ["[step] gets up.", "eats."],
                "label": "0",
            },
            Choice("Skating: She falls. She", ("gets up.", "eats."), 0),
        ),
        (
            {
                "instruction": "Please choose the correct answer to the question: What melts?\n\nAnswer1: stone"
                " Answer2: ice cream Answer3: fire\n\nAnswer format: answer1/answer2/answer3",
                "input": "",
                "output": "the correct answer is answer2",
                "answer": "answer2",
            },
            Choice("What melts?", ("stone", "ice cream", "fire"), 1),
        ),
        (
            {
                "instruction": "Please answer honestly.",
                "input": "Question: Which is a drug? Options: A. salt, B. insulin, human, C. tea",
                "output": "The answer is: B. insulin, human",
                "class": "medicine",
            },
            Choice("Which is a drug?", ("salt", "insulin, human", "tea"), 1, "medicine"),
        ),
        (
            {
                "instruction": "Please answer the following question with true or false, question: is tea a drink?\n\n"
                "Answer format: true/false",
                "input": "",
                "output": "the correct answer is true",
            },
            Choice("Question: is tea a drink?", ("no", "yes"), 1),
        ),
    ],
)  # fmt: skip
def test_a_question_is_read_in_every_form(row: Mapping[str, Any], expected: Choice) -> None:
    assert choice(row) == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Q"}, "it has no 'choices'; its columns are question"),
        ({"question": "Q", "choices": ["a"], "answer": 0}, "at least two options, got 1"),
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "its answer '2' is none of its 2"),
        ({"question": "Q", "choices": ["a", "b"], "answer": "both"}, "must be a place or a letter"),
        ({"instruction": "Write a poem.", "output": "Rose"}, "neither numbered, nor lettered"),
    ],
)
def test_what_is_no_question_is_one_sentence(tmp_path: Path, row: Any, said: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="is no item of this suite") as caught:
        read_items(file, choice)
    assert said in str(caught.value)


def test_files_may_be_packed(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl.gz"
    rows = [
        {"question": "1 + 1?", "answer": "Easy. #### 2"},
        {"question": "2?", "answer": "#### 2"},
    ]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_items(file, gsm8k) == [Sum("1 + 1?", "Easy. #### 2"), Sum("2?", "#### 2")]
    with pytest.raises(ValueError, match="does not exist, or is a folder"):
        read_items(tmp_path, gsm8k)


@pytest.mark.realtext
def test_the_sets_of_adapter_benchmarks_are_read(real_text: Path) -> None:
    for name, options in (("ARC-Easy", 4), ("ARC-Challenge", 4), ("openbookqa", 4), ("boolq", 2)):
        items = read_items(real_text / "commonsense" / name / "test.json", choice)
        assert len(items) > 100
        sizes = [len(item.options) for item in items if isinstance(item, Choice)]
        assert max(set(sizes), key=sizes.count) == options
        assert len({item.gold for item in items if isinstance(item, Choice)}) == options
    items = read_items(real_text / "mmlu" / "test_1444.jsonl", choice)
    assert len(items) == 1444
    assert len({item.subject for item in items if isinstance(item, Choice)}) > 40
