"""Chats with models of runs, as `fedloom chat` has them: one answer at a time, told while it is written."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.board.folder import Folder
from fedloom.board.listing import stamp_of
from fedloom.data.formats import Message
from fedloom.result import open_run
from fedloom.results.chat import AUTO, Chat
from fedloom.results.routing import ROUTING
from fedloom.results.suites import BASE
from fedloom.rounds.reading import read_json
from fedloom.rounds.session import Session

_HELD = 2
"""Runs whose models are kept in memory."""
_BOUND = ("recipe.yaml", "inputs.json")
_LONGEST = 100_000
"""Characters of a conversation."""
SHARED = ""
"""In place of a model's name: the one that all clients of a run share."""
Say = Callable[[Mapping[str, str]], None]


class Stopped(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Question:
    """What a model is asked, behind what was said."""

    run: str
    model: str
    """Its name, or a client's; SHARED, `base` or `auto`."""
    text: str
    messages: tuple[Message, ...] = ()

    @classmethod
    def read(cls, body: bytes) -> "Question":
        """Read a question as the page sends it.

        Raises:
            ValueError: saying what it is not.
        """
        try:
            found = json.loads(body)
            said = tuple(Message(each["role"], each["content"]) for each in found["messages"])
            asked = cls(found["run"], found["model"], found["text"], said)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError("a question has run, model, text and messages") from error
        texts = [asked.run, asked.model, asked.text, *(m.content for m in said)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a question is text")
        if any(message.role not in ("user", "assistant") for message in said):
            raise ValueError("what was said is said by user or assistant")
        if not asked.text.strip() or sum(map(len, texts)) > _LONGEST:
            raise ValueError(f"a conversation has 1 to {_LONGEST} characters")
        return asked


@dataclass
class Talk:
    """Answers questions, one after another, and keeps the models of the last runs that were asked."""

    folder: Folder
    _sessions: "OrderedDict[Path, tuple[object, Session]]" = field(default_factory=OrderedDict)
    _one: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, question: Question, say: Say, stopped: threading.Event) -> None:
        """Answer; `say` is told of the state, of the text so far, and of the whole answer.

        Raises:
            Stopped: where `stopped` was set meanwhile.
            ValueError: where the run has no such model, or the conversation has outgrown it.
        """
        path = self.folder.run(question.run)
        if not self._one.acquire(blocking=False):
            say({"state": "waiting for another answer"})
            while not self._one.acquire(timeout=0.2):
                _check(stopped)
        try:
            _check(stopped)
            chat = Chat.open(self._session(path, say), question.model or None)
            chat.messages = question.messages
            _check(stopped)
            say({"state": "answering"})

            def told(text: str) -> None:
                _check(stopped)
                say({"text": text})

            answer = chat.answer(question.text.strip(), told=told)
        finally:
            self._one.release()
        routed = chat.route.reason if chat.route else ""
        say({"answer": answer, "model": chat.name, "route": routed})

    def _session(self, path: Path, say: Say) -> Session:
        stamp = stamp_of(path, _BOUND)[0]
        known = self._sessions.get(path)
        if known is None or known[0] != stamp:
            self._sessions.pop(path, None)
            while len(self._sessions) >= _HELD:
                self._sessions.popitem(last=False)
            say({"state": "loading the model"})
            self._sessions[path] = known = (stamp, open_run(path).open("chat").session)
        self._sessions.move_to_end(path)
        return known[1]


def models_of(run: Path) -> Sequence[tuple[str, str]]:
    """Return the models of a run that can be asked: name, and what the page calls it."""
    file = run / "adapters" / ROUTING
    routing: dict[str, Any] = {}
    if file.exists():
        routing = read_json(file, dict, remedy="`fedloom export` writes it anew")
    found = routing.get("models")
    names = [str(name) for name in found] if isinstance(found, dict) else []
    before = (BASE, "before training")
    if len(names) < 2:
        return [(SHARED, "after training"), before]
    return [*((name, name) for name in names), (AUTO, "chosen by what is asked"), before]


def _check(stopped: threading.Event) -> None:
    if stopped.is_set():
        raise Stopped
