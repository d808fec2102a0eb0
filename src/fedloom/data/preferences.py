"""Rows that say which answer is preferred, or which is good: to conversations with both answers, and those to tokens.

Pairs are prompt, chosen and rejected: as text, as turns, or as two whole conversations that differ in their last answer.
Single answers are prompt, answer and good.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedloom.data.cells import short
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.formats import (
    Conversations,
    Formats,
    Message,
    Record,
    Talk,
    talk_of,
    text_of,
    to_records,
)
from fedloom.data.jsontext import json_of
from fedloom.data.readers import Row
from fedloom.data.tokens import IGNORED, Example, Tokenised, sequences
from fedloom.data.tools import COLUMN as TOOLS
from fedloom.data.turns import is_talk

_SIDES = ("chosen", "rejected")
_FLAGS = ("good", "label", "kto_tag")
_HUMAN = re.compile(r"\n\n(Human|Assistant):")
"""How hh-rlhf writes whose turn it is."""
_TRUTH: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}
_PROMPTS = ("conversations", "prompt", "question", "instruction", "messages")
"""Columns that may hold what is answered, the first one there counts."""


def to_pairs(rows: Sequence[Row], settings: DataSettings) -> Conversations:
    """Return a conversation a row, with the answer that its last one is preferred to.

    Raises:
        ValueError: with the row, where it is no pair.
    """
    _check_format(settings)
    return to_records(rows, settings, PAIRS, unknown=_no_pair)


def to_judged(rows: Sequence[Row], settings: DataSettings) -> Conversations:
    """Return a conversation a row, whose last answer is said to be good or bad; of a pair, with both its answers.

    Raises:
        ValueError: with the row, where it is neither.
    """
    _check_format(settings)
    return to_records(rows, settings, {**PAIRS, **JUDGED}, unknown=_not_judged)


def check_unpacked(settings: DataSettings) -> None:
    """Refuse rows that share a sequence.

    Raises:
        ValueError: where `data.packing` is set.
    """
    if settings.packing:
        raise ValueError(
            "data.packing must be false for an objective of preferences, whose answers are compared one by one"
        )


def _check_format(settings: DataSettings) -> None:
    if settings.format != "auto":
        raise ValueError(
            f"data.format must be auto for an objective of preferences, got {settings.format}: rows go by the names of"
            " their columns, which data.columns can rename"
        )


# --- pairs --------------------------------------------------------------------------------------


def _pair(row: Row, given: tuple[Message, ...], column: str) -> Talk:
    """Return a pair of answers to what a column asks, or of conversations that hold the question themselves."""
    sides = {name: row.values.get(name) for name in _SIDES}
    turns = {name for name in _SIDES if is_talk(sides[name])}
    if len(turns) == 1 and isinstance(sides[min(turns)], str):
        turns = set()  # a text that happens to be JSON
    texts = {name: text_of(row, name) for name in _SIDES if name not in turns}
    # One alone is an answer that happens to begin so.
    spoken = all(map(_is_spoken, texts.values()))
    found = [
        talk_of(row, name) if name in turns else _written(texts[name], spoken=spoken)
        for name in _SIDES
    ]
    chosen, rejected = (talk.messages for talk in found)
    ignored = frozenset[str]().union(*(talk.ignored for talk in found))
    if not chosen or not rejected:
        return Talk(given)
    if chosen[0].role != "assistant":
        given = _shared(row, chosen, rejected)
        ignored |= {column} if column and not _says(row, column, given) else frozenset()
    elif len(chosen) != 1 or len(rejected) != 1 or rejected[0].role != "assistant":
        raise ValueError(
            f"{row.place}: chosen and rejected must be an answer each, or whole conversations that differ in their last"
            " answer alone"
        )
    elif not given:
        raise ValueError(
            f"{row.place}: chosen and rejected are answers without a question: name its column prompt in data.columns"
        )
    messages = (*_unlearnt(given), replace(chosen[-1], learn=True))
    return Talk(messages, ignored, rejected=rejected[-1].content, rejected_use=rejected[-1].use)


def _shared(
    row: Row, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[Message, ...]:
    """Return what two conversations have in common before their last answers."""
    said = [[(m.role, m.content) for m in talk[:-1]] for talk in (chosen, rejected)]
    ends = {chosen[-1].role, rejected[-1].role}
    if said[0] != said[1] or ends != {"assistant"}:
        raise ValueError(
            f"{row.place}: chosen and rejected are conversations, which must be alike up to their last answer"
        )
    return chosen[:-1]


def _says(row: Row, column: str, given: tuple[Message, ...]) -> bool:
    """Return whether a column says nothing but what conversations say themselves."""
    value = row.values[column]
    return column == "messages" or any(
        m.content == value or (isinstance(value, str) and m.content == value.strip()) for m in given
    )


def _is_spoken(text: str) -> bool:
    """Return whether a text says whose turn it is, as hh-rlhf does."""
    return text.startswith("Human:")


def _written(text: str, *, spoken: bool) -> Talk:
    """Return an answer, or the turns of a text that says whose they are."""
    if not spoken:
        return Talk((Message("assistant", text),) if text else ())
    parts = _HUMAN.split(f"\n\n{text}")
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return Talk(
        tuple(
            Message("user" if who == "Human" else "assistant", said.strip()) for who, said in turns
        )
    )


def _question(row: Row, column: str) -> tuple[Message, ...]:
    """Return what is answered: turns, or a text."""
    value: Any = json_of(row.values[column])
    if isinstance(value, Mapping) and "messages" in value:  # OpenAI's: {"messages": [...]}
        row = replace(row, values={**row.values, column: value["messages"]})
    if is_talk(row.values[column]):
        return talk_of(row, column).messages
    text, more = text_of(row, column), text_of(row, "input") if column == "instruction" else ""
    whole = f"{text}\n\n{more}" if text and more else text or more
    return (Message("user", whole, more if text else ""),) if whole else ()


def _unlearnt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(replace(m, learn=m.role != "assistant") for m in messages)


def _pair_behind(column: str) -> Callable[[Row], Talk]:
    return lambda row: _pair(row, _question(row, column), column)


def _optional(column: str) -> tuple[str, ...]:
    return ("input", "system") if column == "instruction" else ("system", TOOLS)


PAIRS: Formats = {
    **{
        f"{column} and pair": ((column, *_SIDES), _optional(column), _pair_behind(column))
        for column in _PROMPTS
    },
    "pair": (_SIDES, ("system", TOOLS), lambda row: _pair(row, (), "")),
}
"""Pairs by the column that asks; of those without one, chosen and rejected are whole conversations."""


def _no_pair(row: Row) -> str:
    flag = next((name for name in _FLAGS if name in row.values), "")
    hint = f"; single answers with {flag} are for objective: kto" if flag else ""
    return (
        f"{row.place}: a pair must have the columns chosen and rejected, and what they answer ({', '.join(_PROMPTS)}),"
        f" got {', '.join(row.values)}; rename columns in data.columns{hint}"
    )


# --- single answers -----------------------------------------------------------------------------


def _judged(row: Row, asked: str, answer: str, flag: str) -> Talk:
    value = row.values[flag]
    good = _TRUTH.get(str(value).strip().casefold())
    if good is None:
        raise ValueError(f"{row.place}: {flag} must be true or false, got {short(value)}")
    messages = _question(row, asked)
    if answer:
        given = row.values[answer]
        said = talk_of(row, answer).messages if is_talk(given) else ()
        messages = (*messages, *(said or [Message("assistant", text_of(row, answer))]))
    if not messages or messages[-1].role != "assistant":
        raise ValueError(
            f"{row.place}: a conversation whose answer is good or bad must end in that answer"
        )
    return Talk((*_unlearnt(messages[:-1]), replace(messages[-1], learn=True)), good=good)


def _judged_by(asked: str, answer: str, flag: str) -> Callable[[Row], Talk]:
    return lambda row: _judged(row, asked, answer, flag)


JUDGED: Formats = {
    f"{' and '.join(filter(None, (asked, answer)))}, judged by {flag}": (
        tuple(filter(None, (asked, answer, flag))),
        _optional(asked),
        _judged_by(asked, answer, flag),
    )
    for asked, answer in (
        ("prompt", "answer"),
        ("prompt", "completion"),
        ("instruction", "output"),
        ("messages", ""),
        ("conversations", ""),
    )
    for flag in _FLAGS
}
"""Single answers by the column that asks, the one that answers, and the one that says whether it is good."""


def _not_judged(row: Row) -> str:
    return (
        f"{row.place}: a row must be prompt, answer and good (true or false; completion and label do too), or messages"
        f" and label, or a pair of chosen and rejected, got {', '.join(row.values)}; rename columns in data.columns"
    )


# --- tokens -------------------------------------------------------------------------------------


def tokenise_answers(
    records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer
) -> Tokenised:
    """Return an example for every record: of a pair, both its answers, behind the same tokens.

    Only last answers are targets. Where one of a pair cuts off more of the prompt, both keep what that one leaves.

    Raises:
        ValueError: where the prompt cannot write a record, or rows shall be packed.
    """
    check_unpacked(settings)
    pairs = [at for at, record in enumerate(records) if record.rejected]
    others = [_other(records[at]) for at in pairs]
    found = sequences([*records, *others], settings, tokenizer, only_last=True)
    beside = dict(zip(pairs, found.of_record[len(records) :], strict=True))
    made: list[tuple[Example, ...]] = []
    num_truncated = num_dropped = num_equal = 0
    for at, (record, own) in enumerate(zip(records, found.of_record, strict=False)):
        sides = [each for some in (own, beside.get(at, ())) for each in some]
        examples = [example for example, _ in sides if example is not None]
        made.append(())
        if not sides:
            continue
        if len(examples) < len(sides):
            num_dropped += 1
            continue
        if len(examples) == 2:
            examples = [_paired(*examples)]
        else:
            examples = [replace(examples[0], good=record.good)]
        whole = examples[0]
        if whole.rejected is not None and torch.equal(whole.ids, whole.rejected.ids):
            num_equal += 1
            continue
        num_truncated += any(cut for _, cut in sides)
        made[-1] = (whole,)
    num_empty = sum(not own for own in found.of_record[: len(records)])
    return Tokenised(
        made, num_truncated, num_dropped, num_empty, found.notes, found.prompt, num_equal
    )


def _other(record: Record) -> Record:
    *before, last = record.messages
    messages = (*before, replace(last, content=record.rejected, use=record.rejected_use))
    return replace(
        record, messages=messages, answer=record.rejected, rejected="", rejected_use=None
    )


def _paired(chosen: Example, rejected: Example) -> Example:
    """Return a pair whose answers stand behind the shorter of the two prompts."""
    prompt = min((row.ids[: row.prompt_length] for row in (chosen, rejected)), key=len)
    chosen, rejected = (_behind(prompt, row) for row in (chosen, rejected))
    return replace(chosen, good=True, rejected=replace(rejected, good=False))


def _behind(prompt: torch.Tensor, row: Example) -> Example:
    """Return an answer behind other tokens."""
    if torch.equal(row.ids[: row.prompt_length], prompt):
        return row
    ids = torch.cat([prompt, row.ids[row.prompt_length :]])
    labels = torch.cat([torch.full_like(prompt, IGNORED), row.labels[row.prompt_length :]])
    return replace(row, ids=ids, labels=labels, prompt_length=len(prompt))


def mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Return one client's examples, each answer with its prompt before the answer to the next one's prompt.

    The last one's next is the first; of a single example there is no other answer.
    """
    if len(examples) < 2:
        return list(examples)
    return [
        _with_mismatch(one, other, max_length)
        for one, other in zip(examples, [*examples[1:], examples[0]], strict=True)
    ]


def _with_mismatch(one: Example, other: Example, max_length: int) -> Example:
    # Of a pair and a single answer, the single one serves for both.
    rejected = one.rejected
    if rejected is not None:
        rejected = replace(rejected, mismatched=_crossed(one, other.answers[-1], max_length))
    return replace(one, mismatched=_crossed(one, other, max_length), rejected=rejected)


def _crossed(one: Example, other: Example, max_length: int) -> Example:
    row = replace(other, rejected=None, mismatched=None, good=None)
    found = _behind(one.ids[: one.prompt_length], row)
    return replace(found, ids=found.ids[:max_length], labels=found.labels[:max_length])
