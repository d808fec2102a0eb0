"""Which answers of a conversation are asked for, and the end tokens a file writes itself."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record


def posed(messages: Sequence[Message], settings: DataSettings, answer: str = "?") -> Record:
    """Return the conversation to be answered, opened by `data.system` as all data is; only its last answer is asked for.

    `answer` is a stand-in where only the tokens before it are read.
    """
    system = (Message("system", settings.system),) if settings.system else ()
    earlier = tuple(replace(message, learn=False) for message in messages)
    return Record((*system, *earlier, Message("assistant", answer)), {}, answer)


def asked(record: Record, *, only_last: bool = False) -> Record | None:
    """Return the conversation up to the last answer that is learnt; None where there is none.

    Args:
        record: A conversation.
        only_last: Whether its last answer alone counts, as of a classifier.
    """
    learnt = _learnt(record.messages)
    while learnt and not record.messages[learnt[-1]].content:
        learnt.pop()
    last = len(record.messages) - 1
    if not learnt or (only_last and learnt[-1] != last):
        return None
    if only_last and len(learnt) > 1:
        before = tuple(replace(message, learn=False) for message in record.messages[:-1])
        return replace(record, messages=(*before, record.messages[-1]))
    return up_to(record, learnt[-1])


def up_to_answer(record: Record, number: int) -> Record:
    """Return the conversation up to the answer of that number, from 1, among those that are learnt."""
    return up_to(record, _learnt(record.messages)[number - 1])


def up_to(record: Record, at: int) -> Record:
    """Return the conversation up to message `at`, an answer, which is then what is compared."""
    if at == len(record.messages) - 1:
        return record
    messages = record.messages[: at + 1]
    return replace(record, messages=messages, answer=messages[-1].content)


def unended(
    records: Sequence[Record], ends: Iterable[str]
) -> tuple[Sequence[Record], tuple[str, ...]]:
    """Take texts of end tokens off the data's answers, so that each ends once; return which were.

    Only where all answers end so is it how the data is written; elsewhere it is what somebody said.
    """
    longest = sorted(ends, key=len, reverse=True)
    taken: tuple[str, ...] = ()
    while end := next((end for end in longest if _all_end_in(end, records)), ""):
        records = _without(end, records)
        taken = (end, *taken)
    return records, taken


def _all_end_in(end: str, records: Sequence[Record]) -> bool:
    return bool(records) and all(record.messages[-1].content.endswith(end) for record in records)


def _without(end: str, records: Sequence[Record]) -> list[Record]:
    """Take `end` off all answers, and off questions where all of them end so too."""
    others = {"system", "user"} - {
        message.role
        for record in records
        for message in record.messages
        if not message.content.endswith(end)
    }
    return [_unended(record, end, {"assistant", *others}) for record in records]


def _unended(record: Record, end: str, roles: set[str]) -> Record:
    messages = tuple(
        replace(
            message,
            content=message.content.removesuffix(end).rstrip(),
            context=message.context.removesuffix(end).rstrip(),
        )
        if message.role in roles
        else message
        for message in record.messages
    )
    return replace(record, messages=messages, answer=record.answer.removesuffix(end).rstrip())


def _learnt(messages: Sequence[Message]) -> list[int]:
    return [at for at, one in enumerate(messages) if one.role == "assistant" and one.learn]
