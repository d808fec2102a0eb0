"""From rows, however their columns are called, to conversations with labels and an answer to compare with."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedloom.data.cells import PRINTED, is_printed, to_text
from fedloom.data.data_settings import DataSettings
from fedloom.data.hints import desirability, no_format, preference
from fedloom.data.jsontext import json_of
from fedloom.data.losses import Losses, RowTally
from fedloom.data.partition import stratum
from fedloom.data.readers import Row
from fedloom.data.sharding import UNKNOWN
from fedloom.data.tools import COLUMN as TOOLS
from fedloom.data.tools import ToolUse, read_tools
from fedloom.data.turns import is_talk, joined_parts, read_turns

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    context: str = ""
    """The last part of `content` where the data keeps it apart (Alpaca's input); the alpaca prompt shows it so."""
    learn: bool = True
    """Of an answer: whether it is a target."""
    use: ToolUse | None = None
    """Where it calls tools, or is what they gave back; `content` is all of that as text."""

    @property
    def asks(self) -> bool:
        """Return whether it is what a user says, and not what a tool gave back."""
        return self.role == "user" and self.use is None


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that ends in an answer."""

    messages: tuple[Message, ...]
    labels: Mapping[str, str]
    answer: str
    """What exact match compares with: the last answer, or the word of its class."""
    held_out: bool = False
    """Whether it is only judged on, never learnt."""
    place: str = ""
    """Where its row was read, for error messages."""
    split: str = ""
    """The split its row comes in, empty where that is still to be cut."""
    rejected: str = ""
    """Of a pair: what the last answer is preferred to."""
    rejected_use: ToolUse | None = None
    """Where that calls tools; `rejected` is all of it as text."""
    good: bool | None = None
    """Whether the last answer is wanted, where a row says so of one answer."""
    tools: str = ""
    """The functions that may be called, as JSON, see `tools.read_tools`."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """What rows became."""

    records: Sequence[Record]
    losses: Losses


@dataclass(frozen=True, slots=True)
class Talk:
    """What a format makes of a row."""

    messages: tuple[Message, ...]
    ignored: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    rejected: str | None = None
    """Of a pair: the answer that the last message is preferred to."""
    rejected_use: ToolUse | None = None
    """Where that calls tools; `rejected` is all of it as text."""
    good: bool | None = None
    """Whether the last message is a wanted answer, where the row says so."""


Converter = Callable[[Row], Talk]
Formats = Mapping[str, tuple[tuple[str, ...], tuple[str, ...], Converter]]
"""By name: columns a format needs, and others it reads; the first one that has all it needs is recognised."""


def to_records(
    rows: Sequence[Row],
    settings: DataSettings,
    formats: Formats | None = None,
    *,
    unknown: Callable[[Row], str] | None = None,
) -> Conversations:
    """Return the conversations of the rows, and what of the rows is in none.

    Args:
        rows: As they were read.
        settings: How to read them.
        formats: Which there are; None: `FORMATS`, of conversations whose answers are learnt.
        unknown: What to say of a row that fits none of them; None: what would make it fit.

    Raises:
        ValueError: with row and column, where a cell is no text or a row fits no format.
    """
    formats = FORMATS if formats is None else formats
    rows = [renamed(row, settings.columns) for row in rows]
    found = {column: None for row in rows for column in row.values}
    labels = label_columns(found, settings) if rows else ()
    used = {*labels, *settings.where, *settings.held_out, *settings.shorter}
    records: list[Record] = []
    tally = RowTally()
    chosen: dict[tuple[str, ...], str] = {}
    for row in rows:
        columns = tuple(row.values)
        name = chosen.get(columns) or _format_of(row, settings, formats, unknown)
        chosen[columns] = name
        needed, optional, convert = formats[name]
        if name in _LEARNT_WHOLE and (wrong := desirability(row, used)):
            raise ValueError(wrong)
        talk = convert(row)
        guess = f"guessed from {' and '.join(needed)}"
        tally.formats[name, guess if settings.format == "auto" else "as data.format says"] += 1
        asked = [
            column for column in dict.fromkeys([*needed, *optional, *labels]) if column in found
        ]
        tally.add_columns_(row.values, asked, used)
        tally.ignored.update(talk.ignored)
        tally.missing.update(talk.missing)
        learnt = _closed(talk.messages)
        if not learnt:
            if name in FORMATS and (wrong := preference(row)):
                raise ValueError(wrong)
            tally.add_unanswered_(marked=_has_unlearnt(talk.messages))
            continue
        equal = (talk.rejected, talk.rejected_use) == (learnt[-1].content, learnt[-1].use)
        if talk.rejected is not None and (equal or not talk.rejected):
            tally.add_pair_(talk.rejected)
            continue
        tally.num_turns += _num_lost(talk.messages, learnt)
        messages = _opened(learnt, _system(row, optional, settings))
        values = {column: row.text(column) or UNKNOWN for column in labels}
        record = Record(messages, values, learnt[-1].content, row.held_out, row.place, row.split)
        record = replace(record, rejected=talk.rejected or "", rejected_use=talk.rejected_use)
        tools = read_tools(row.values.get(TOOLS), row.place) if TOOLS in optional else ""
        records.append(replace(record, good=talk.good, tools=tools))
    return Conversations(records, tally.losses())


# --- one function a format ----------------------------------------------------------------------


def _prompt_completion(row: Row) -> Talk:
    sides = ("prompt", "completion")
    talks = {column for column in sides if is_talk(row.values[column])}
    if all(is_printed(row.values[column]) for column in sides):
        raise ValueError(f"{row.place}: prompt and completion {PRINTED}")
    if len(talks) == 1 and isinstance(row.values[min(talks)], str):
        talks = set()  # a text that happens to be JSON
    if not talks:
        return _pair(text_of(row, "prompt"), text_of(row, "completion"))
    prompt, completion = (
        talk_of(row, column) if column in talks else _one(row, column) for column in sides
    )
    # As in TRL: the completion alone is learnt.
    given = tuple(replace(m, learn=m.role != "assistant") for m in prompt.messages)
    return Talk(
        (*given, *completion.messages),
        prompt.ignored | completion.ignored,
        prompt.missing | completion.missing,
    )


def _alpaca(row: Row) -> Talk:
    return _pair(text_of(row, "instruction"), text_of(row, "output"), context=text_of(row, "input"))


def _dolly(row: Row) -> Talk:
    return _pair(
        text_of(row, "instruction"), text_of(row, "response"), context=text_of(row, "context")
    )


def _squad(row: Row) -> Talk:
    # XQuAD's files have a byte order mark in front of some paragraphs.
    context = row.text("context").strip("\ufeff \n")
    return _pair(f"{context}\n\n{row.text('question')}", _first_answer(row))


def _question_answer(row: Row) -> Talk:
    context = text_of(row, "context")
    question = text_of(row, "question")
    return _pair(f"{context}\n\n{question}" if context else question, text_of(row, "answer"))


def _natural_instructions(row: Row) -> Talk:
    output = row.values["output"]
    if isinstance(output, list | tuple):
        output = output[0] if output else None
    answer = replace(row, values={**row.values, "output": output}).text("output")
    return _pair(row.text("definition"), answer, context=row.text("input"))


def _messages(row: Row) -> Talk:
    return _conversation(row, "messages")


def _sharegpt(row: Row) -> Talk:
    return _conversation(row, "conversations")


_LEARNT_WHOLE = ("messages", "sharegpt", "prompt-completion")
"""Formats that preference data has too, with a column `label`."""
FORMATS: Formats = {
    "messages": (("messages",), ("system", TOOLS), _messages),
    "sharegpt": (("conversations",), ("system", TOOLS), _sharegpt),
    "natural-instructions": (("definition", "input", "output"), (), _natural_instructions),
    "squad": (("context", "question", "answers"), (), _squad),
    "alpaca": (("instruction", "output"), ("input", "system"), _alpaca),
    "dolly": (("instruction", "response"), ("context",), _dolly),
    "gsm8k": (("question", "answer"), ("context",), _question_answer),
    "prompt-completion": (("prompt", "completion"), (TOOLS,), _prompt_completion),
}


def _format_of(
    row: Row, settings: DataSettings, formats: Formats, unknown: Callable[[Row], str] | None
) -> str:
    if settings.format == "auto" or unknown is not None:
        for name, (needed, _, _) in formats.items():
            if all(column in row.values for column in needed):
                return name
        if unknown is not None:
            raise ValueError(unknown(row))
        known = [(name, needed) for name, (needed, _, _) in formats.items()]
        raise ValueError(preference(row) or no_format(row, known))
    needed, _, _ = FORMATS[settings.format]
    if any(column not in row.values for column in needed):
        raise ValueError(
            f"{row.place}: data.format {settings.format} needs the columns {', '.join(needed)}, found "
            f"{', '.join(row.values)}; data.columns can rename them"
        )
    return settings.format


# --- what all formats share ---------------------------------------------------------------------


def text_of(row: Row, column: str) -> str:
    """Return a cell as text, parts of content as what they say."""
    try:
        return to_text(joined_parts(row.values.get(column))).strip()
    except ValueError as error:
        raise ValueError(f"{row.place}: {column} {error}") from error


def _pair(prompt: str, completion: str, context: str = "") -> Talk:
    whole = f"{prompt}\n\n{context}" if context and prompt else prompt or context
    asked = Message("user", whole, context if prompt else "")
    return Talk((asked, Message("assistant", completion)))


def talk_of(row: Row, column: str) -> Talk:
    """Return the turns of a cell."""
    try:
        found = read_turns(row.values[column], column)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from error
    messages = tuple(
        Message(turn.role, turn.content, learn=turn.learn, use=turn.use) for turn in found.turns
    )
    return Talk(messages, found.ignored, found.missing)


def _conversation(row: Row, column: str) -> Talk:
    talk = talk_of(row, column)
    if any(message.role == "system" for message in talk.messages) and row.text("system"):
        return replace(talk, ignored=talk.ignored | {"system"})
    return talk


def _one(row: Row, column: str) -> Talk:
    return Talk((Message("user" if column == "prompt" else "assistant", text_of(row, column)),))


def _first_answer(row: Row) -> str:
    """Return the first of the answers: of a list, in the file's form or the Hub's, or the one there is."""
    if is_printed(row.values["answers"]):
        raise ValueError(f"{row.place}: answers {PRINTED}")
    first: object = json_of(row.values["answers"])
    if (
        isinstance(first, Mapping) and "text" in first
    ):  # the Hub's form: {"text": [...], "answer_start": [...]}
        first = first["text"]
    if isinstance(first, list | tuple):
        first = first[0] if first else None
    if (
        isinstance(first, Mapping) and "text" in first
    ):  # the file's form: [{"text": ..., "answer_start": ...}]
        first = first["text"]
    return replace(row, values={"answers": first}).text("answers")


def _closed(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Cut what follows the last answer that is learnt and answers nobody asked for; no empty answer is learnt."""
    remaining = [
        replace(m, learn=m.learn and bool(m.content)) if m.role == "assistant" else m
        for m in messages
    ]
    while remaining and not (remaining[-1].role == "assistant" and remaining[-1].learn):
        remaining.pop()
    asked = [i for i, message in enumerate(remaining) if message.asks]
    if not asked:
        return ()
    return tuple(m for i, m in enumerate(remaining) if i >= asked[0] or m.role == "system")


def _has_unlearnt(messages: Sequence[Message]) -> bool:
    return any(one.role == "assistant" and one.content and not one.learn for one in messages)


def _num_lost(messages: Sequence[Message], remaining: Sequence[Message]) -> int:
    empty = sum(message.role == "assistant" and not message.content for message in remaining)
    return len(messages) - len(remaining) + empty


def _system(row: Row, optional: Collection[str], settings: DataSettings) -> str | None:
    """Return the system message of a conversation that has none: the row's own, else the recipe's."""
    return (row.text("system") if "system" in optional else "") or settings.system


def _opened(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    if system is None or any(message.role == "system" for message in messages):
        return messages
    return (Message("system", system), *messages)


KNOWN_LABELS = (
    "language",
    "task",
    "category",
    "client",
    "user",
    "author",
    "domain",
    "topic",
    "file",
)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row with its columns called as `data.columns` says.

    Raises:
        ValueError: where one is not there, or would take the place of another.
    """
    if not columns:
        return row
    for new, old in columns.items():
        if old not in row.values:
            raise ValueError(
                f"{row.place}: data.columns names {old!r}, but the columns are {', '.join(row.values)}"
            )
        if new in row.values and new not in columns.values():
            raise ValueError(
                f"{row.place}: data.columns calls {old!r} {new!r}, but there is a column {new!r}, which would be lost;"
                f" give that one another name too, such as data.columns={{{new}: {old}, old_{new}: {new}}}"
            )
    others = {name: value for name, value in row.values.items() if name not in columns.values()}
    return replace(row, values=others | {new: row.values[old] for new, old in columns.items()})


def label_columns(found: Collection[str], settings: DataSettings) -> tuple[str, ...]:
    """Return the columns that are kept as labels, of those there are.

    Raises:
        ValueError: where the recipe names one that is not there.
    """
    by = stratum(settings.partition)
    wanted = dict.fromkeys(settings.labels or (name for name in KNOWN_LABELS if name in found))
    for where, names in (("data.labels", wanted), ("data.partition.by", [by] if by else [])):
        for name in names:
            if name not in found:
                raise ValueError(f"{where} names {name!r}, but the columns are {', '.join(found)}")
    if by:
        wanted.setdefault(by)
    return tuple(wanted)
