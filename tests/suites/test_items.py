"""Items from files of every form they come in, and what is none."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedloom.suites.items import (
    Choice,
    Passage,
    Sum,
    Task,
    choice,
    gsm8k,
    passage,
    read_items,
    task,
)
from fedloom.suites.sources import Source


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
        ({"question": "Q", "A": "x", "B": "y", "answer": "B"}, Choice("Q", ("x", "y"), 1)),
        (
            {
                "question": {"stem": "Q", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]},
                "answerKey": "1",
            },
            Choice("Q", ("x", "y"), 0),
        ),
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
        ({"question": "Q", "choices": ["a"], "answer": 0}, "two to 10 options, got 1"),
        ({"question": "Q", "choices": [*"abcdefghijk"], "answer": 0}, "two to 10 options, got 11"),
        ({"question": "Q", "choices": "(a b", "answer": 0}, 'no list of texts: "(a b"'),
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "its answer '2' is none of its 2"),
        ({"question": "Q", "choices": ["a", "b"], "answer": "both"}, "must be a place or a letter"),
        ({"instruction": "Write a poem.", "output": "Rose"}, "neither numbered, nor lettered"),
    ],
)
def test_what_is_no_question_is_one_sentence(tmp_path: Path, row: Any, said: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="is no item of this suite") as caught:
        read_items(Source(str(file)), choice)
    assert said in str(caught.value)


def test_files_may_be_packed(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl.gz"
    rows = [
        {"question": "1 + 1?", "answer": "Easy. #### 2"},
        {"question": "2?", "answer": "#### 2"},
    ]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_items(Source(str(file)), gsm8k) == [
        Sum("1 + 1?", "Easy. #### 2"),
        Sum("2?", "#### 2"),
    ]
    # A folder is all of its files.
    (tmp_path / "more.jsonl").write_text(json.dumps(rows[0]))
    assert len(read_items(Source(str(tmp_path)), gsm8k)) == 3
    with pytest.raises(ValueError, match=r"the suite's file .*none.jsonl does not exist"):
        read_items(Source(str(tmp_path / "none.jsonl")), gsm8k)


def test_a_folder_called_as_a_known_data_set_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2?", "answer": "#### two"}]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=r"line 2 is no item .* end in `#### number`, got '#### two'"
    ):
        read_items(Source("gsm8k"), gsm8k)


def test_a_text_and_its_questions_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "xquad.el.json"
    answers = [{"text": "308", "answer_start": 1}, {"text": "308 points"}, {"text": "308"}]
    asked = {"question": "How many?", "answers": answers, "id": "1"}
    paragraph = {"context": "\ufeff They gave up 308 points. ", "qas": [asked, asked]}
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    wanted = Passage("They gave up 308 points.", "How many?", ("308", "308 points"))
    assert read_items(Source(str(file)), passage) == [wanted, wanted]
    hub = {"context": "C", "question": "Q", "answers": {"text": ["a"], "answer_start": [0]}}
    assert passage(hub) == Passage("C", "Q", ("a",))


def test_tasks_are_rows_of_any_form_that_data_takes(tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    instances = [{"id": "1", "input": "ab", "output": ["b", "B"]}]
    file.write_text(json.dumps({"Definition": ["Say the last."], "Instances": instances}))
    (found,) = read_items(Source(str(file)), task)
    assert isinstance(found, Task)
    assert found.answers == ("b", "B")
    assert found.record.place == f"{file}, row 1"
    assert "Say the last." in found.text
    assert "ab" in found.text
    alpaca = task({"instruction": "Say the last.", "input": "ab", "output": "b"})
    assert (alpaca.answers, alpaca.record.answer) == (("b",), "b")
    with pytest.raises(ValueError, match="no answer"):
        task({"prompt": "x", "completion": ""})
    file.write_text(json.dumps([{"q": "x", "a": "y"}]))
    with pytest.raises(
        ValueError, match=r"row 1 is no item of this suite: its columns are of no known"
    ) as no:
        read_items(Source(str(file)), task)
    # What a recipe says of its own data is no remedy here.
    assert "data.columns" not in str(no.value)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("openai/gsm8k:main:train", ("openai/gsm8k", "main", "train")),
        ("google/boolq::validation", ("google/boolq", None, "validation")),
        ("owner/set", ("owner/set", None, "test")),
    ],
)
def test_a_set_of_the_hub_is_named_with_configuration_and_split(
    name: str, asked: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = datasets.Dataset.from_list([{"question": "1?", "answer": "#### 1"}] * 3)
    seen = []

    def load(source: str, config: str | None, *, split: str, revision: None) -> Any:
        seen.append((source, config, split))
        return given

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source(name)
    assert read_items(source, gsm8k) == [Sum("1?", "#### 1")] * 3
    assert source.sha256 == Source(name).sha256
    assert seen[0] == asked


@pytest.mark.realtext
def test_the_sets_of_adapter_benchmarks_are_read(real_text: Path) -> None:
    for name, options in (("ARC-Easy", 4), ("ARC-Challenge", 4), ("openbookqa", 4), ("boolq", 2)):
        items = read_items(Source(str(real_text / "commonsense" / name / "test.json")), choice)
        assert len(items) > 100
        sizes = [len(item.options) for item in items if isinstance(item, Choice)]
        assert max(set(sizes), key=sizes.count) == options
        assert len({item.gold for item in items if isinstance(item, Choice)}) == options
    items = read_items(Source(str(real_text / "mmlu" / "test_1444.jsonl")), choice)
    assert len(items) == 1444
    assert len({item.subject for item in items if isinstance(item, Choice)}) > 40
