"""Turns are read in the conventions there are; what is learnt of them, and what is no text."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import to_records
from fedloom.data.losses import Losses
from fedloom.data.readers import Row
from fedloom.data.turns import ROLES, Role, is_talk


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def read(**columns: Any) -> tuple[list[tuple[Role, str, bool]], Losses]:
    """Return who says what and whether it is learnt, and what is not read, of one row."""
    found = to_records([Row(columns, "a.jsonl", 3, "line")], DataSettings(source="a.jsonl"))
    said = [(m.role, m.content, m.learn) for record in found.records for m in record.messages]
    return said, found.losses


def learnt(*turns: dict[str, Any]) -> dict[str, bool]:
    return {
        text: learn for role, text, learn in read(messages=list(turns))[0] if role == "assistant"
    }


CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = '{"name": "add", "arguments": {"a": 1}}'


# --- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}], "A\nB"),
        ([{"type": "input_text", "text": "A", "image_url": None}], "A"),
        ([], "[]"),
        ({"q": True}, '{"q": true}'),
        ([1, 2], "[1, 2]"),
        (2.5, "2.5"),
        (None, ""),
    ],
)
def test_content_is_text_parts_or_json(content: Any, text: str):
    assert read(messages=[user(content), assistant("x")])[0][0] == ("user", text, True)


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_either_name_of_the_column_has_either_names_of_the_keys(column: str, keys: tuple[str, str]):
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("Human", "a"), ("GPT", "b"))]
    for value in (turns, json.dumps(turns)):
        assert read(**{column: value})[0] == [("user", "a", True), ("assistant", "b", True)]


def test_a_conversational_prompt_and_its_completion_are_turns_of_which_the_completion_is_learnt():
    prompt = [{"role": "developer", "content": "S"}, user("a"), assistant("old"), user("b")]
    expected = [
        ("system", "S", True),
        ("user", "a", True),
        ("assistant", "old", False),
        ("user", "b", True),
        ("assistant", "c", True),
    ]
    for completion in ([assistant("c")], assistant("c"), "c"):
        assert read(prompt=prompt, completion=completion)[0] == expected
    assert read(prompt=json.dumps(prompt), completion=json.dumps([assistant("c")]))[0] == expected
    assert read(prompt="a", completion=[assistant("c")])[0] == [
        ("user", "a", True),
        ("assistant", "c", True),
    ]


def test_objects_that_only_look_like_turns_and_texts_that_only_look_like_json_stay():
    trip = {"from": "Berlin", "to": "Paris", "value": 3}
    assert read(prompt="a", completion=trip)[0][1][1] == json.dumps(trip)
    text = json.dumps([user("a")])
    assert read(prompt=text, completion="How many turns? One.")[0][0] == ("user", text, True)


def test_calls_of_tools_are_answers_and_their_results_are_told():
    said, losses = read(
        messages=[
            user("1 + 1?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "x", "content": "2"},
            {"role": "tool", "tool_call_id": "y", "content": {"r": 3}},
            assistant("Two", tool_calls=[]),
        ]
    )
    assert said == [
        ("user", "1 + 1?", True),
        ("assistant", CALLED, True),
        ("user", '2\n{"r": 3}', True),
        ("assistant", "Two", True),
    ]
    assert losses.ignored == {}
    assert losses.missing == {}


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        (assistant(None, tool_calls=[CALL, CALL]), f"[{CALLED}, {CALLED}]"),
        (assistant("Wait", tool_calls=[CALL]), f"Wait\n{CALLED}"),
        ({"role": "assistant", "tool_calls": [CALL]}, CALLED),
        (assistant("", tool_calls=json.dumps([CALL])), CALLED),
        (assistant(None, tool_calls=[{"name": "add", "arguments": {"a": 1}}]), CALLED),
        (assistant(None, function_call=CALL["function"]), CALLED),
        (
            assistant(None, function_call={"name": "say", "arguments": ""}),
            '{"name": "say", "arguments": ""}',
        ),
        ({"from": "function_call", "value": CALLED}, CALLED),
        ({"from": "function_call", "value": json.loads(CALLED)}, CALLED),
    ],
)
def test_a_call_is_json_of_name_and_arguments_never_an_empty_answer(
    turn: dict[str, Any], text: str
):
    assert read(messages=[user("a"), turn])[0][1] == ("assistant", text, True)


# --- what is learnt -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"training": False},
        {"trainable": False},
        {"loss": False},
        {"masked": True},
        {"weight": 0, "train": False},
    ],
    ids=str,
)
def test_an_answer_that_is_marked_is_not_learnt(mark: dict[str, Any]):
    kept = {name: not value for name, value in mark.items()}
    turns = [user("a"), assistant("b", **mark), user("c"), assistant("d", **kept)]
    assert learnt(*turns) == {"b": False, "d": True}
    assert learnt(user("a"), assistant("b", **dict.fromkeys(mark))) == {"b": True}


def test_a_conversation_ends_in_its_last_learnt_answer():
    said, losses = read(
        messages=[assistant("Hi"), user("a"), assistant("b"), user("c"), assistant("d", weight=0)]
    )
    assert said == [("user", "a", True), ("assistant", "b", True)]
    assert losses.num_turns == 3


def test_a_conversation_without_a_learnt_answer_is_left_out_and_counted():
    said, losses = read(messages=[user("a"), assistant("b", weight=0)])
    assert (said, losses.num_unlearnt, losses.num_empty) == ([], 1, 0)


def test_an_empty_answer_is_never_learnt():
    said, losses = read(messages=[user("a"), assistant(None), user("b"), assistant("c")])
    assert said[1] == ("assistant", "", False)
    assert (losses.num_turns, losses.missing) == (1, {"messages[].content": 1})


def test_keys_nobody_reads_are_named():
    turns = [user("a", name="Bob", weight=1), assistant("b", refusal=None, thinking="hm")]
    assert read(messages=turns, id=7)[1].ignored == {
        "id": 1,
        "messages[].name": 1,
        "messages[].thinking": 1,
        "messages[].weight of a user turn": 1,
    }


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (assistant("b", weight=0.5), "messages[1].weight must be 0 or 1, true or false, got 0.5"),
        (assistant("b", weight="0"), 'messages[1].weight must be 0 or 1, true or false, got "0"'),
        (assistant("b", loss=[1]), "messages[1].loss must be 0 or 1, true or false, got [1]"),
        (
            assistant("b", weight=1, train=False),
            "messages[1] says both that it is learnt and that it is not",
        ),
        (
            assistant("b", train_detail=[]),
            "messages[1] has train_detail, but a turn is learnt whole or not at all",
        ),
        (
            assistant([{"type": "image_url", "image_url": {"url": "x"}}]),
            'messages[1].content holds a part of type "image_url"; only text is learnt',
        ),
        (assistant(b"b"), "messages[1].content holds bytes, which are no text"),
        (assistant({"a": "\ud800"}), "messages[1].content holds '\\ud800', half a character"),
        (
            assistant(None, tool_calls="x"),
            'messages[1].tool_calls must be a list of calls, got "x"',
        ),
        (
            assistant(None, tool_calls=[{"id": 1}]),
            'messages[1].tool_calls: a call must have a name and arguments, got {"id": 1}',
        ),
        (
            assistant(None, tool_calls=[{"name": " ", "arguments": {}}]),
            'messages[1].tool_calls: a call must have a name and arguments, got {"name": " "',
        ),
        (
            assistant(None, function_call={"name": "say", "arguments": "no JSON"}),
            'messages[1].function_call: the arguments of say must be a JSON object, got "no JSON"',
        ),
        (
            assistant(None, tool_calls=[{"name": "say", "arguments": "[1]"}]),
            "messages[1].tool_calls: the arguments of say must be a JSON object, got [1]",
        ),
        (
            assistant(None, tool_calls=[{"name": "say", "arguments": {"a": float("inf")}}]),
            "messages[1].tool_calls: the arguments of say holds a number that is not finite",
        ),
        (
            {"from": "function_call", "value": "add(1)"},
            'messages[1].value, a call, must be JSON with name and arguments, got "add(1)"',
        ),
        (
            {"from": "function_call", "value": '{"arguments": {}}'},
            'messages[1].value: a call must have a name and arguments, got {"arguments": {}}',
        ),
        (
            {"from": "function_call", "value": '[1, {"name": "add"}]'},
            "messages[1].value: a call must have a name and arguments, got 1",
        ),
        (
            {"role": "narrator", "content": "b"},
            "messages[1].role must be one of system, developer,",
        ),
        ({"role": None, "content": "b"}, "messages[1], a turn, must have role and content"),
        ("b", 'messages[1], a turn, must have role and content (or from and value), got "b"'),
    ],
    ids=str,
)
def test_a_turn_that_cannot_be_read_is_named_with_its_row(turn: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(f"a.jsonl, line 3: {message}")):
        read(messages=[user("a"), turn])


def test_what_python_printed_is_refused():
    printed = str([user("a"), assistant("b")])
    with pytest.raises(ValueError, match=r"line 3: messages must be a list of turns.*json\.dumps"):
        read(messages=printed)
    with pytest.raises(ValueError, match=r"line 3: prompt and completion are lists .*json\.dumps"):
        read(prompt=str([user("a")]), completion=str([assistant("b")]))
    with pytest.raises(ValueError, match=r"line 3: answers are lists .*json\.dumps"):
        read(context="a", question="b", answers="{'text': ['c']}")


LEAF: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, 0.5, "a", "user", "assistant", "tool", "[", '{"name": "f"}', []]
)
KEYS = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "weight",
        "mask",
        "tool_calls",
        "function",
        "name",
        "type",
        "text",
    ]
)
ODD = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)
)


@settings(max_examples=300, deadline=None)
@given(
    row=st.dictionaries(
        st.sampled_from(
            [
                "messages",
                "prompt",
                "completion",
                "chosen",
                "rejected",
                "answers",
                "context",
                "question",
            ]
        ),
        ODD,
        min_size=1,
    )
)
def test_whatever_looks_like_turns_is_read_or_refused_in_a_sentence(row: dict[str, Any]):
    try:
        said, losses = read(**row)
    except ValueError as error:
        assert str(error).startswith("a.jsonl, line 3: ")  # noqa: PT017 - either outcome is right
        return
    assert bool(said) + losses.num_empty + losses.num_unlearnt == 1


def test_every_role_is_one_of_three():
    assert set(ROLES.values()) == {"system", "user", "assistant"}
    assert not is_talk([{"role": "narrator", "content": "x"}])
    assert not is_talk([])
