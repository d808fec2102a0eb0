"""Every format becomes a conversation; what cannot is named with its place."""

import math
import re
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import FORMATS, Conversations, Record, to_records
from fedloom.data.partition import Dirichlet
from fedloom.data.readers import Row

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
    "gsm8k": (
        "How many?",
        "1,000 + 1 = 1,001\n#### 1,001",
        "1,000 + 1 = 1,001\n#### 1,001",
    ),
    "natural-instructions": ("Negate.\n\nyes", "no", "no"),
}


def read(*rows: dict[str, Any], **given: Any) -> Conversations:
    placed = [Row(row, "a.jsonl", line, "line") for line, row in enumerate(rows, start=1)]
    return to_records(placed, DataSettings(source="a.jsonl", **given))


def records(*rows: dict[str, Any], **given: Any) -> list[Record]:
    return list(read(*rows, **given).records)


def said(record: Record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record.messages]


@pytest.mark.parametrize("how", ["recognised", "named"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name: str, how: str):
    """All fields of the schema."""
    (record,) = records(SAMPLES[name], **({"format": name} if how == "named" else {}))
    question, reply, answer = SAID[name]
    assert said(record)[-2:] == [("user", question), ("assistant", reply)]
    assert record.answer == answer


@pytest.mark.parametrize("missing", [{}, {"input": None}, {"input": ""}, {"input": "  "}])
def test_a_missing_input_never_prints_none(missing: dict[str, Any]):
    """FederatedScope wrote "### Input: None" into every prompt."""
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


@pytest.mark.parametrize("answer", ["Ada", "#### Heading\nAda\n#### Another\nBabbage"])
def test_question_and_answer_compare_the_whole_text(answer: str):
    assert records({"question": "Who?", "answer": answer})[0].answer == answer


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
        ({"messages": "hi"}, {}, 'a.jsonl, line 1: messages must be a list of turns, got "hi"'),
        (
            {"messages": [{"role": "user"}]},
            {},
            "a.jsonl, line 1: messages[0], a turn, must have role and content (or from and value), "
            'got {"role": "user"}',
        ),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            {},
            "a.jsonl, line 1: conversations[0].from must be one of system, developer, user, human, prompter, assistant, "
            "gpt, chatgpt, bot, model, function_call, tool_call, tool, function, observation, ipython, tool_response, "
            'got "narrator"',
        ),
    ],
)
def test_a_row_that_cannot_be_read_says_where_and_what_is_known(
    row: dict[str, Any], given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        records(row, **given)


# --- what is not read, and what is no answer --------------------------------------------------------


def test_rows_are_records_or_counted_and_columns_used_missing_or_named():
    losses = read(
        {"instruction": "a", "input": None, "output": "b", "language": "en", "id": 1, "note": None},
        {"instruction": "a", "output": True, "language": math.nan, "id": 2},
        {"instruction": "a", "output": math.nan, "topic": "x", "source": "y"},
        where={"source": ["y"]},
    ).losses
    assert losses.formats == {"alpaca (guessed from instruction and output)": 3}
    assert (losses.num_empty, losses.num_unlearnt, losses.num_turns) == (1, 0, 0)
    assert losses.ignored == {"id": 2}
    assert losses.missing == {"input": 3, "language": 2, "output": 1, "topic": 2}


def test_a_format_that_is_named_is_no_guess():
    said = read(SAMPLES["gsm8k"], format="gsm8k").losses.formats
    assert said == {"gsm8k (as data.format says)": 1}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "a", "output": ["x", 1, None]}, '["x", 1, null]'),
        ({"prompt": "a", "completion": {"known": True}}, '{"known": true}'),
        ({"prompt": "a", "completion": [{"type": "text", "text": "x"}]}, "x"),
        ({"question": "a", "answer": False}, "false"),
        ({"definition": "a", "input": "b", "output": [{"c": 1}]}, '{"c": 1}'),
        ({"context": "a", "question": "b", "answers": "Ada"}, "Ada"),
        ({"context": "a", "question": "b", "answers": ["Ada", "B"]}, "Ada"),
        ({"context": "a", "question": "b", "answers": {"text": [3]}}, "3"),
        ({"context": "a", "question": "b", "answers": '{"text": ["Ada"]}'}, "Ada"),
    ],
)
def test_an_answer_of_any_type_is_text_or_json(row: dict[str, Any], text: str):
    assert records(row)[0].answer == text


def test_a_context_beside_question_and_answer_is_read():
    (record,) = records({"context": "c", "question": "q", "answer": "a"})
    assert said(record) == [("user", "c\n\nq"), ("assistant", "a")]


def test_the_system_message_of_a_row_stands_where_its_turns_have_none():
    row = {**SAMPLES["alpaca"], "system": "Be odd."}
    assert said(records(row, system="Be kind.")[0])[0] == ("system", "Be odd.")
    found = read({**SAMPLES["messages"], "system": "Be odd."})
    assert said(found.records[0])[0] == ("system", "Be brief.")
    assert found.losses.ignored == {"system": 1}


def test_labels_are_text_as_any_cell():
    row = {**SAMPLES["alpaca"], "language": True, "task": 1.0, "topic": ["a"], "domain": math.nan}
    assert records(row)[0].labels == {
        "language": "true",
        "task": "1.0",
        "topic": '["a"]',
        "domain": "unknown",
    }


def test_renaming_displaces_no_column():
    row = {"prompt": "p", "q": "q", "completion": "c"}
    message = "a.jsonl, line 1: data.columns calls 'q' 'prompt', but there is a column 'prompt', which would be lost"
    with pytest.raises(ValueError, match=re.escape(message)):
        records(row, columns={"prompt": "q"})
    found = read(row, columns={"prompt": "q", "old_prompt": "prompt"})
    assert said(found.records[0]) == [("user", "q"), ("assistant", "c")]
    assert found.losses.ignored == {"old_prompt": 1}
    swapped = records(row, columns={"prompt": "completion", "completion": "prompt"})
    assert said(swapped[0]) == [("user", "c"), ("assistant", "p")]


YOU, ME = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "b"}, {"completion": "chosen"}),
        ({"prompt": "q", "chosen": [YOU, ME], "rejected": []}, {"messages": "chosen"}),
        ({"chosen": [YOU, ME], "rejected": [YOU]}, {"messages": "chosen"}),
        ({"prompt": [YOU], "chosen": [ME], "rejected": [ME]}, {"completion": "chosen"}),
        (
            {"messages": [YOU], "chosen": ME, "rejected": ME},
            {"prompt": "messages", "completion": "chosen"},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            {"prompt": "conversations", "completion": "chosen"},
        ),
        ({"instruction": "q", "chosen": "good", "rejected": "b"}, {"output": "chosen"}),
        (
            {"question": "q", "chosen": "good", "rejected": ""},
            {"prompt": "question", "completion": "chosen"},
        ),
        (
            {"input": "q", "preferred_output": [ME], "non_preferred_output": [ME]},
            {"prompt": "input", "completion": "preferred_output"},
        ),
    ],
)
def test_preference_pairs_are_refused_with_what_would_learn_the_better_answer(
    row: dict[str, Any], columns: dict[str, str]
):
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: .* are a pair of preference") as caught:
        records(row)
    remedy = ", ".join(f"{new}: {old}" for new, old in columns.items())
    assert str(caught.value).endswith(f"data.columns={{{remedy}}}")
    assert said(records(row, columns=columns)[0]) == [("user", "q"), ("assistant", "good")]


def test_answers_marked_as_bad_are_not_learnt_by_mistake():
    row = {**SAMPLES["messages"], "label": False}
    with pytest.raises(ValueError, match=r"line 1: label is false, as in preference data \(KTO\)"):
        records(row)
    assert len(records(row, where={"label": ["false"]})) == 1
    assert records(row, labels=["label"])[0].labels == {"label": "false"}
    assert read({**row, "label": "a"}).losses.ignored == {"label": 1}
    assert read({**SAMPLES["alpaca"], "label": False}).losses.ignored == {"label": 1}


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"query": "a", "response": "b"},
            ", such as data.columns={prompt: query, completion: response}",
        ),
        (
            {"inputs": "a", "targets": "b"},
            ", such as data.columns={prompt: inputs, completion: targets}",
        ),
        ({"dialog": [YOU, ME]}, ", such as data.columns={messages: dialog}"),
        ({"text": "a"}, "; a text alone has no answer: part it into prompt and completion"),
        ({"a": 1}, "rename columns in data.columns"),
    ],
)
def test_columns_of_no_format_come_with_a_remedy(row: dict[str, Any], hint: str):
    with pytest.raises(ValueError, match=re.escape(hint) + "$"):
        records(row)
