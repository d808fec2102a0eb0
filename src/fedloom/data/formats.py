"""From rows, however their columns are called, to conversations with labels and an answer to compare with."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedloom.data.dealing import UNKNOWN
from fedloom.data.partition import stratum
from fedloom.data.readers import Row
from fedloom.data.settings import DataSettings

Role = Literal["system", "user", "assistant"]

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
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    context: str = ""
    """The last part of `content` where the data keeps it apart (Alpaca's input); the alpaca prompt shows it so."""
    learn: bool = True
    """Of an answer: whether it is a target."""


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that ends in an answer."""

    messages: tuple[Message, ...]
    labels: Mapping[str, str]
    answer: str
    """What exact match compares with: the last answer, or what counts in it (GSM8K's number)."""
    held_out: bool = False
    """Whether it is only judged on, never learnt."""
    place: str = ""
    """Where its row was read, for error messages."""


Talk = tuple[tuple[Message, ...], str]
"""Messages, and the answer to compare with."""


def to_records(rows: Sequence[Row], settings: DataSettings) -> list[Record]:
    """Return the conversations of the rows; rows without an answer are left out."""
    renamed = [_renamed(row, settings.columns) for row in rows]
    wanted = _label_columns(renamed, settings)
    chosen: dict[frozenset[str], str] = {}
    records = []
    for row in renamed:
        name: str = settings.format
        if name == "auto":
            columns = frozenset(row.values)
            name = chosen.get(columns) or chosen.setdefault(columns, _recognised(row))
        needed, convert = FORMATS[name]
        missing = [column for column in needed if column not in row.values]
        if missing:
            raise ValueError(
                f"{row.place}: data.format {name} needs the columns {', '.join(needed)}, found "
                f"{', '.join(row.values)}; data.columns can rename them"
            )
        messages, answer = convert(row)
        messages = _opened(_closed(messages), settings.system)
        if any(message.role == "assistant" for message in messages):
            if settings.classes:
                messages, answer = _classified(messages, row, settings)
            labels = {column: _label(row.values.get(column)) for column in wanted}
            compared = answer or messages[-1].content
            records.append(Record(messages, labels, compared, row.held_out, row.place))
    return records


# --- one function a format ----------------------------------------------------------------------


def _prompt_completion(row: Row) -> Talk:
    return _pair(row.text("prompt"), row.text("completion"))


def _alpaca(row: Row) -> Talk:
    return _pair(row.text("instruction"), row.text("output"), context=row.text("input"))


def _dolly(row: Row) -> Talk:
    return _pair(row.text("instruction"), row.text("response"), context=row.text("context"))


def _squad(row: Row) -> Talk:
    answers = row.values["answers"]
    texts: object = answers
    if isinstance(answers, Mapping):  # the Hub's form: {"text": [...], "answer_start": [...]}
        texts = answers.get("text")
    first = texts[0] if isinstance(texts, Sequence) and not isinstance(texts, str) and texts else ""
    if isinstance(first, Mapping):  # the file's form: [{"text": ..., "answer_start": ...}]
        first = first.get("text")
    # XQuAD's files have a byte order mark in front of some paragraphs.
    context = row.text("context").strip("\ufeff \n")
    return _pair(f"{context}\n\n{row.text('question')}", str(first or ""))


def _gsm8k(row: Row) -> Talk:
    solution = row.text("answer")
    messages, _ = _pair(row.text("question"), solution)
    _, mark, number = solution.rpartition("####")
    return messages, number.strip().replace(",", "") if mark else ""


def _natural_instructions(row: Row) -> Talk:
    output = row.values["output"]
    if isinstance(output, Sequence) and not isinstance(output, str):
        output = output[0] if output else ""
    return _pair(row.text("definition"), str(output or ""), context=row.text("input"))


def _messages(row: Row) -> Talk:
    return _turns(row, "messages", "role", "content")


def _sharegpt(row: Row) -> Talk:
    return _turns(row, "conversations", "from", "value")


def _turns(row: Row, column: str, role: str, content: str) -> Talk:
    turns = row.values[column]
    if not isinstance(turns, Iterable) or isinstance(turns, str | Mapping):
        raise ValueError(f"{row.place}: {column} must be a list of turns, got {turns!r}")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or role not in turn or content not in turn:
            raise ValueError(
                f"{row.place}: a turn of {column} must have {role} and {content}, got {turn!r}"
            )
        name = ROLES.get(str(turn[role]))
        if name is None:
            raise ValueError(
                f"{row.place}: the {role} of a turn must be one of {', '.join(ROLES)}, got {turn[role]!r}"
            )
        messages.append(Message(name, _clean(turn[content])))
    return tuple(messages), ""


Converter = Callable[[Row], Talk]
FORMATS: dict[str, tuple[tuple[str, ...], Converter]] = {
    # Columns a format needs; the first one that has all its columns is recognised.
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "natural-instructions": (("definition", "input", "output"), _natural_instructions),
    "squad": (("context", "question", "answers"), _squad),
    "alpaca": (("instruction", "output"), _alpaca),
    "dolly": (("instruction", "response"), _dolly),
    "gsm8k": (("question", "answer"), _gsm8k),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
}


def _recognised(row: Row) -> str:
    for name, (needed, _) in FORMATS.items():
        if all(column in row.values for column in needed):
            return name
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _) in FORMATS.items())
    raise ValueError(
        f"{row.place}: no known format has the columns {', '.join(row.values)}; the formats are {known}; "
        "name one in data.format and rename columns in data.columns"
    )


# --- what all formats share ---------------------------------------------------------------------


def _pair(prompt: str, completion: str, context: str = "") -> Talk:
    whole = f"{prompt}\n\n{context}" if context and prompt else prompt or context
    return (Message("user", whole, context if prompt else ""), Message("assistant", completion)), ""


def _clean(value: object) -> str:
    """Return the text of a cell; null is empty, never the word None."""
    return "" if value is None else str(value).strip()


def _label(value: object) -> str:
    return _clean(value) or UNKNOWN


def _closed(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Cut what follows the last answer and answers nobody asked for; drop empty answers at the end."""
    kept = list(messages)
    while kept and (kept[-1].role != "assistant" or not kept[-1].content):
        kept.pop()
    asked = [i for i, message in enumerate(kept) if message.role == "user"]
    if not asked:
        return ()
    return tuple(m for i, m in enumerate(kept) if i >= asked[0] or m.role == "system")


def _classified(messages: tuple[Message, ...], row: Row, settings: DataSettings) -> Talk:
    said = messages[-1].content
    if said not in settings.classes:
        raise ValueError(
            f"{row.place}: the answer {said[:40]!r} is not among data.classes"
            f" ({', '.join(settings.classes)}); add it, or leave its rows out with data.where"
        )
    word = settings.classes[said]
    return (*messages[:-1], replace(messages[-1], content=word)), word


def _opened(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    if system is None or any(message.role == "system" for message in messages):
        return messages
    return (Message("system", system), *messages) if messages else ()


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    if not columns:
        return row
    for name in columns.values():
        if name not in row.values:
            raise ValueError(
                f"{row.place}: data.columns names {name!r}, but the columns are {', '.join(row.values)}"
            )
    kept = {name: value for name, value in row.values.items() if name not in columns.values()}
    return replace(row, values=kept | {new: row.values[old] for new, old in columns.items()})


def _label_columns(rows: Sequence[Row], settings: DataSettings) -> tuple[str, ...]:
    found = {column: None for row in rows for column in row.values}
    by = stratum(settings.partition)
    wanted = dict.fromkeys(settings.labels or (name for name in KNOWN_LABELS if name in found))
    for where, names in (("data.labels", wanted), ("data.partition.by", [by] if by else [])):
        for name in names:
            if rows and name not in found:
                raise ValueError(f"{where} names {name!r}, but the columns are {', '.join(found)}")
    if by:
        wanted.setdefault(by)
    return tuple(wanted)
