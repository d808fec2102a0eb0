"""What gives way where a conversation is longer than there is room: whole turns first, then the head of a question."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fedloom.data.encoding import Encoder, Pieces
from fedloom.data.formats import Message, Record
from fedloom.data.rendering import Render, Rendering

_QUESTION = "\ue0b5"
"""Stands for what is said while its place in the prompt is looked for."""


@dataclass(frozen=True, slots=True)
class Shortener:
    """Shortens conversations from their beginning; the last answer stays whole."""

    render: Render
    encoder: Encoder
    room: int
    """Tokens there is room for."""

    def __call__(
        self, rendering: Rendering, pieces: Pieces
    ) -> list[tuple[Rendering, Pieces] | None]:
        """Return the sequences that are left, None for one whose answer does not fit."""
        if self._fits(pieces):
            return [(rendering, pieces)]
        record = rendering.record
        starts = _starts(record)
        if len(starts) == 1:
            return [self._cut(rendering, pieces)]

        def fits(dropped: int) -> bool:
            return all(
                map(self._fits, self.encoder.pieces(self.render(_since(record, starts[dropped]))))
            )

        dropped = bisect_left(range(len(starts) - 1), True, lo=1, key=fits)
        left = self.render(_since(record, starts[dropped]))
        return [self._cut(*each) for each in zip(left, self.encoder.pieces(left), strict=True)]

    def _fits(self, pieces: Pieces) -> bool:
        return sum(map(len, pieces)) <= self.room

    def _cut(self, rendering: Rendering, pieces: Pieces) -> tuple[Rendering, Pieces] | None:
        """Take tokens off the head of the question, all but one; what the prompt writes around it stays."""
        over = sum(map(len, pieces)) - self.room
        gone: set[int] = set()
        for start, end in self._questions(rendering, pieces[0]) if over > 0 else ():
            there = [at for at in range(start, end) if at not in gone]
            taken = there[: min(over, len(there) - 1)] if there else []
            gone.update(taken)
            over -= len(taken)
        if over > 0:
            return None
        first = [token for at, token in enumerate(pieces[0]) if at not in gone]
        return rendering, [first, *pieces[1:]]

    def _questions(self, rendering: Rendering, ids: list[int]) -> Iterator[tuple[int, int]]:
        """Yield where what the user says begins and ends among the first segment's tokens, in the order it gives way."""
        text = rendering.segments[0].text
        for record in _asked_otherwise(rendering.record):
            written = self.render(record)[-1].segments[0].text
            head, mark, tail = written.partition(_QUESTION)
            if mark and text.startswith(head) and text.endswith(tail):
                before = text[: len(head)], text[: len(text) - len(tail)]
                start, end = (
                    _shared(self.encoder.ids(one, rendering.hidden), ids) for one in before
                )
                yield start, end


def _starts(record: Record) -> list[int]:
    """Return where each turn begins: with a question behind an answer, or the first one."""
    talk = [(at, one) for at, one in enumerate(record.messages) if one.role != "system"]
    roles = [one.role for _, one in talk]
    return [
        at
        for (at, one), before in zip(talk, ["assistant", *roles], strict=False)
        if one.asks and before == "assistant"
    ]


def _since(record: Record, start: int) -> Record:
    """Return the conversation from a turn on, and what the system said before."""
    systems = tuple(one for one in record.messages[:start] if one.role == "system")
    return replace(record, messages=(*systems, *record.messages[start:]))


def _asked_otherwise(record: Record) -> Iterator[Record]:
    """Yield the conversation with a mark for a question: for all of it, and for each of its parts kept apart."""
    for at, message in enumerate(record.messages):
        if message.role == "assistant":
            return
        if message.asks:
            for marked in _marked(message):
                messages = (*record.messages[:at], marked, *record.messages[at + 1 :])
                yield replace(record, messages=messages)


def _marked(message: Message) -> Iterator[Message]:
    if message.context:
        # What is to be done is kept longest.
        question = message.content.removesuffix(message.context)
        yield replace(message, content=question + _QUESTION, context=_QUESTION)
        yield replace(
            message, content=_QUESTION + question[len(question.rstrip()) :] + message.context
        )
    # A prompt that shows the two apart has no such place.
    yield replace(message, content=_QUESTION, context="")


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens two begin with alike."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
