"""Every format becomes a conversation; what cannot is named with its place."""

import re
from typing import Any

import pytest

from fedloom.data.formats import FORMATS, Record, to_records
from fedloom.data.partition import Dirichlet
from fedloom.data.readers import Row
from fedloom.data.settings import DataSettings

SAMPLES: dict[str, dict[str, Any]] = {
    "prompt-completion": {"prompt": "Capital of France?", "completion": "Paris"},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    },
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "dolly": {"instruction": "Who?", "context": "Ada wrote.", "response": "Ada", "category": "qa"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    },
    "squad": {
        "context": "\ufeffAda wrote.",
        "question": "Who?",
        "answers": {"text": ["Ada"], "answer_start": [0]},
    },
    "gsm8k": {"question": "How many?", "answer": "1,000 + 1 = 1,001\n#### 1,001"},
    "natural-instructions": {"definition": "Negate.", "input": "yes", "output": ["no", "nope"]},
}
SAID = {
    "prompt-completion": ("Capital of France?", "Paris", "Paris"),
    "messages": ("Hi", "Hello", "Hello"),
    "alpaca": ("Add.\n\n1 and 2", "3", "3"),
    "dolly": ("Who?\n\nAda wrote.", "Ada", "Ada"),
    "sharegpt": ("Hi", "Hello", "Hello"),
    "squad": ("Ada wrote.\n\nWho?", "Ada", "Ada"),
    "gsm8k": ("How many?", "1,000 + 1 = 1,001\n#### 1,001", "1001"),
    "natural-instructions": ("Negate.\n\nyes", "no", "no"),
}


def records(*rows: dict[str, Any], **given: Any) -> list[Record]:
    placed = [Row(row, "a.jsonl", line, "line") for line, row in enumerate(rows, start=1)]
    return to_records(placed, DataSettings(source="a.jsonl", **given))


def said(record: Record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record.messages]


@pytest.mark.parametrize("how", ["recognised", "named"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name: str, how: str):
    """fs_llm B1, the schema."""
    (record,) = records(SAMPLES[name], **({"format": name} if how == "named" else {}))
    question, reply, answer = SAID[name]
    assert said(record)[-2:] == [("user", question), ("assistant", reply)]
    assert record.answer == answer


@pytest.mark.parametrize("missing", [{}, {"input": None}, {"input": ""}, {"input": "  "}])
def test_a_missing_input_never_prints_none(missing: dict[str, Any]):
    """fs_llm B1: FederatedScope wrote "### Input: None" into every prompt."""
    (record,) = records({"instruction": "Add.", "output": "3", **missing})
    assert record.messages[0].content == "Add."
    assert record.messages[0].context == ""


def test_an_input_without_instruction_stands_alone():
    (record,) = records({"instruction": None, "input": "1 + 2", "output": "3"})
    assert (record.messages[0].content, record.messages[0].context) == ("1 + 2", "")


def test_alpaca_wins_where_columns_fit_two_formats():
    (record,) = records({"instruction": "Add.", "output": "3", "response": "three"})
    assert record.answer == "3"


def test_rows_of_different_formats_may_be_mixed():
    assert [record.answer for record in records(*SAMPLES.values())] == [
        SAID[name][2] for name in SAMPLES
    ]


def test_columns_rename():
    row = {"ask": "Capital of France?", "reply": "Paris", "language": "en"}
    (record,) = records(row, columns={"prompt": "ask", "completion": "reply"})
    assert said(record) == [("user", "Capital of France?"), ("assistant", "Paris")]
    assert record.labels == {"language": "en"}


def test_squad_answers_in_the_file_form_and_without_answer():
    row = {"context": "Ada wrote.", "question": "Who?"}
    found = records(
        {**row, "answers": [{"text": "Ada", "answer_start": 0}]},
        {**row, "answers": []},
        {**row, "answers": {"text": []}},
    )
    assert [record.answer for record in found] == ["Ada"]


def test_question_and_answer_without_a_number_compare_the_text():
    assert records({"question": "Who?", "answer": "Ada"})[0].answer == "Ada"


def test_a_row_without_an_answer_is_left_out():
    empty: list[dict[str, Any]] = [
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": " "},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": []},
        {"definition": "a", "input": "b", "output": []},
    ]
    assert records(*empty) == []
    assert len(records(*empty, SAMPLES["alpaca"])) == 1


def test_a_conversation_is_cut_to_asked_and_answered_turns():
    turns = [
        ("gpt", "Welcome"),
        ("human", "1"),
        ("gpt", "one"),
        ("human", "2"),
        ("gpt", "two"),
        ("human", "bye"),
    ]
    (record,) = records({"conversations": [{"from": who, "value": what} for who, what in turns]})
    assert said(record) == [
        ("user", "1"),
        ("assistant", "one"),
        ("user", "2"),
        ("assistant", "two"),
    ]
    assert record.answer == "two"


def test_the_system_message_stands_where_there_is_none():
    brief, own = records(SAMPLES["alpaca"], SAMPLES["messages"], system="Be kind.")
    assert said(brief)[0] == ("system", "Be kind.")
    assert said(own)[0] == ("system", "Be brief.")


def test_known_labels_are_kept_and_others_on_request():
    row = {**SAMPLES["prompt-completion"], "language": "en", "level": 3, "author": None}
    assert records(row)[0].labels == {"language": "en", "author": "unknown"}
    assert records(row, labels=["level"])[0].labels == {"level": "3"}
    assert records(row, partition=Dirichlet("level"))[0].labels == {
        "language": "en",
        "author": "unknown",
        "level": "3",
    }


@pytest.mark.parametrize(
    ("row", "given", "message"),
    [
        (
            {"text": "a", "lang": "en"},
            {},
            "a.jsonl, line 1: no known format has the columns text, lang; the formats are messages (messages); "
            "sharegpt (conversations); natural-instructions (definition, input, output); squad (context, question, answers)",
        ),
        ({"text": "a"}, {}, "name one in data.format and rename columns in data.columns"),
        (
            {"prompt": "a", "completion": "b"},
            {"format": "alpaca"},
            "a.jsonl, line 1: data.format alpaca needs the columns instruction, output, found prompt, completion; "
            "data.columns can rename them",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"columns": {"prompt": "ask"}},
            "a.jsonl, line 1: data.columns names 'ask', but the columns are prompt, completion",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"labels": ["topic"]},
            "data.labels names 'topic', but the columns are prompt, completion",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"partition": Dirichlet("topic")},
            "data.partition.by names 'topic', but the columns are prompt, completion",
        ),
        ({"messages": "hi"}, {}, "a.jsonl, line 1: messages must be a list of turns, got 'hi'"),
        (
            {"messages": [{"role": "user"}]},
            {},
            "a turn of messages must have role and content, got {'role': 'user'}",
        ),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            {},
            "the from of a turn must be one of system, developer, user, human, assistant, gpt, chatgpt, bot, model, got 'tool'",
        ),
    ],
)
def test_a_row_that_cannot_be_read_says_where_and_what_is_known(
    row: dict[str, Any], given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        records(row, **given)
