"""A chat on the board: what `fedloom chat` answers, told while it is written, before and after training."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.board.conftest import client_of

from fedloom.board.folder import Folder
from fedloom.board.talk import Question, Stopped, Talk
from fedloom.result import open_run


def asked(folder: Path, **fields: Any) -> list[dict[str, str]]:
    body = {"run": "run", "model": "", "messages": [], "text": "What is 2 + 2?", **fields}
    answer = client_of(folder).post("/chat", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_an_answer_is_told_while_it_is_written_and_is_the_commands(trained: Path) -> None:
    chat = open_run(trained / "run").chat()
    wanted = [chat.answer("What is 2 + 2?"), chat.answer("and now?")]
    told = asked(trained)
    assert told[0] == {"state": "loading the model"}
    assert told[-1] == {"answer": wanted[0], "model": "global", "route": ""}
    texts = [line["text"] for line in told if "text" in line]
    assert texts
    assert len(set(texts)) == len(texts)
    assert all(wanted[0].startswith(text) for text in texts), "all but the last word"
    said = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": wanted[0]},
    ]
    assert asked(trained, messages=said, text="and now?")[-1]["answer"] == wanted[1]


def test_the_model_before_training_answers_beside_the_trained_one(trained: Path) -> None:
    talk, seen = Talk(Folder.at(trained)), list[dict[str, str]]()
    say: Callable[[Any], None] = seen.append
    for model in ("base", "", "base", ""):
        talk.answer(Question("run", model, "What is 2 + 2?"), say, threading.Event())
    answers = [line["answer"] for line in seen if "answer" in line]
    assert answers[:2] == answers[2:]
    own = open_run(trained / "run")
    assert answers[:2] == [
        own.chat("base").answer("What is 2 + 2?"),
        own.chat().answer("What is 2 + 2?"),
    ]
    assert sum(line.get("state") == "loading the model" for line in seen) == 1


def test_an_answer_that_nobody_waits_for_ends(trained: Path) -> None:
    stopped, seen = threading.Event(), list[Any]()

    def say(what: Any) -> None:
        seen.append(what)
        if "text" in what:
            stopped.set()

    talk = Talk(Folder.at(trained))
    with pytest.raises(Stopped):
        talk.answer(Question("run", "", "What is 2 + 2?"), say, stopped)
    assert sum("text" in line for line in seen) == 1
    talk.answer(Question("run", "", "What is 2 + 2?"), seen.append, threading.Event())
    assert "answer" in seen[-1]


def test_what_cannot_be_answered_is_a_sentence(trained: Path) -> None:
    assert "must be one of" in asked(trained, model="nobody")[-1]["error"]
    assert "longer than data.max_length" in asked(trained, text="a " * 900)[-1]["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("nonsense", "a question has run, model, text and messages"),
        ("[]", "a question has run, model, text and messages"),
        ({"messages": [{"role": "user"}]}, "a question has run, model, text and messages"),
        ({"text": 3}, "a question is text"),
        ({"text": "  "}, "a conversation has 1 to"),
        ({"messages": [{"role": "system", "content": "x"}]}, "is said by user or assistant"),
        ({"text": "x" * 200_000}, "a conversation has 1 to"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, body: Any, said: str) -> None:
    whole = {"run": "run", "model": "", "messages": [], "text": "?"}
    text = json.dumps({**whole, **body}) if isinstance(body, dict) else body
    headers = {"content-type": "application/json"}
    answer = client_of(tmp_path).post("/chat", content=text, headers=headers)
    assert answer.status_code == 400
    assert said in answer.text


def test_a_question_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    headers = {"content-type": "application/json"}
    answer = client_of(tmp_path).post("/chat", content=b"x" * (1 << 21), headers=headers)
    assert answer.status_code == 413
