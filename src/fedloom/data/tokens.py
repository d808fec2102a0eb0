"""From conversations to token ids and targets, once and for all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fedloom.data.formats import Record
from fedloom.data.prompts import ChatTemplate, Rendering, Segment, make_render
from fedloom.data.settings import DataSettings

IGNORED = -100
"""The label of a token that is not learnt."""
CHUNK = 1024
"""Conversations tokenised at a time: many enough for a fast tokenizer's threads, few enough for memory."""


class Tokenizer(ChatTemplate, Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """Return the id of the begin-of-sequence token."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """Return the id of the end-of-sequence token."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Return the ids that are not text."""
        ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, Any]:
        """Return `input_ids`, a list of ids for every text."""
        ...

    def decode(self, token_ids: list[int]) -> Any:
        """Return the text of the ids."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence to train or test on."""

    ids: Tensor
    """(length,) int64"""
    labels: Tensor
    """(length,) int64, -100 where there is no loss; labels[t] is the target of the model's output at t - 1."""
    prompt_length: int
    """ids[:prompt_length] is what generation starts from; 0 in packed rows."""
    record: Record | None = None
    """None for packed rows."""
    positions: Tensor | None = None
    """(length,) int64, from 0 again at every example of a packed row; None where nothing is packed."""

    @property
    def num_targets(self) -> int:
        """Return how many tokens are learnt; the first of a row has nothing to be predicted from."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Tokenised:
    """What became of the records."""

    examples: Sequence[tuple[Example, ...]]
    """Of each record: mostly one; none where the answer was truncated away."""
    num_truncated: int
    """Examples kept that lost some of their prompt or answer."""
    num_dropped: int
    """Examples that lost all of their answer."""


def tokenise(records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer) -> Tokenised:
    """Return the examples of every record.

    tokens(prompt) is a prefix of every example. Where the tokenizer would merge across the boundary, the two
    sides are encoded apart; elsewhere the whole text is encoded at once, as the model has seen text before.
    """
    render = make_render(settings, tokenizer)
    start = _start(tokenizer) if settings.prompt != "chat" else []
    made: list[tuple[Example, ...]] = []
    num_truncated = num_dropped = 0
    for first in range(0, len(records), CHUNK):
        renderings = [render(record) for record in records[first : first + CHUNK]]
        pieces = _encode([one for of_record in renderings for one in of_record], tokenizer)
        for of_record in renderings:
            kept = []
            for rendering in of_record:
                example, truncated = _example(rendering, next(pieces), start, settings)
                num_dropped += example is None
                num_truncated += truncated and example is not None
                kept += [example] if example else []
            made.append(tuple(kept))
    return Tokenised(made, num_truncated, num_dropped)


def _start(tokenizer: Tokenizer) -> list[int]:
    """Return the begin token, where this tokenizer writes one; a chat template writes its own."""
    ids = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    return (
        ids[:1]
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        else []
    )


# --- encoding -----------------------------------------------------------------------------------


def _encode(renderings: Sequence[Rendering], tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """Yield, for every rendering, the ids of each of its segments."""
    eos = tokenizer.eos_token or ""
    growing = [
        list(accumulate(segment.text + eos * segment.end for segment in rendering.segments))
        for rendering in renderings
    ]
    flat = iter(_ids([text for texts in growing for text in texts], tokenizer))
    for rendering, texts in zip(renderings, growing, strict=True):
        wholes = [next(flat) for _ in texts]
        pieces = _differences(wholes)
        if pieces is None or not _ends_once(rendering.segments, pieces, tokenizer):
            pieces = _apart(rendering.segments, tokenizer)
        yield pieces


def lengths(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the number of tokens of every text, special ones not counted."""
    return [len(ids) for ids in _ids(list(texts), tokenizer)] if texts else []


def _ids(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _differences(wholes: list[list[int]]) -> list[list[int]] | None:
    """Return what each prefix adds to the one before; None where one is not a prefix of the next."""
    pieces = wholes[:1]
    for shorter, longer in pairwise(wholes):
        if longer[: len(shorter)] != shorter:
            return None
        pieces.append(longer[len(shorter) :])
    return pieces


def _ends_once(
    segments: Sequence[Segment], pieces: Sequence[list[int]], tokenizer: Tokenizer
) -> bool:
    """Return whether every answer ends in exactly one end token."""
    end = tokenizer.eos_token_id
    return all(
        ids[-1:] == [end] and ids[-2:] != [end, end]
        for segment, ids in zip(segments, pieces, strict=True)
        if segment.end
    )


def _apart(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[list[int]]:
    """Encode every segment by itself.

    Behind a line break, which is cut off again: a vocabulary that puts a space in front of every text
    (SentencePiece) would otherwise put one inside this one.
    """
    anchor, *behind = _ids(["\n", *("\n" + segment.text for segment in segments)], tokenizer)
    alone = _ids([segment.text for segment in segments], tokenizer)
    pieces = [
        ids[len(anchor) :] if first_or_merged and ids[: len(anchor)] == anchor else plain
        for first_or_merged, ids, plain in zip(
            [False, *[True] * (len(segments) - 1)], behind, alone, strict=True
        )
    ]
    end = tokenizer.eos_token_id
    assert end is not None  # make_render refused a tokenizer without
    return [ids + [end] * segment.end for ids, segment in zip(pieces, segments, strict=True)]


# --- one example --------------------------------------------------------------------------------


def _example(
    rendering: Rendering, pieces: list[list[int]], start: list[int], settings: DataSettings
) -> tuple[Example | None, bool]:
    """Return the example, None where no target is left, and whether anything was cut."""
    pieces = [start + pieces[0], *pieces[1:]]
    over = sum(map(len, pieces)) - settings.max_length
    if over > 0 and settings.truncate == "prompt":
        # The begin token stays, and one token of the prompt, from which the answer is predicted.
        first = pieces[0][len(start) :]
        pieces[0] = start + first[min(over, max(0, len(first) - 1)) :]
    ids: list[int] = []
    labels: list[int] = []
    record = rendering.record
    prompt_length = 0
    for number, (segment, piece) in enumerate(zip(rendering.segments, pieces, strict=True)):
        if segment.learn:
            if len(ids) >= settings.max_length:
                record = _shortened(record, number)
                break
            prompt_length = len(ids)
        ids += piece
        labels += piece if segment.learn else [IGNORED] * len(piece)
    # The first token has nothing to be predicted from; in a packed row it would be another example's end.
    ids, labels = ids[: settings.max_length], [IGNORED, *labels[1 : settings.max_length]]
    if all(label == IGNORED for label in labels):
        return None, over > 0
    example = Example(torch.tensor(ids), torch.tensor(labels), min(prompt_length, len(ids)), record)
    return example, over > 0


def _shortened(record: Record, segment: int) -> Record:
    """Return the conversation up to the last answer before `segment` (each answer is every second one)."""
    answers = [i for i, message in enumerate(record.messages) if message.role == "assistant"]
    last = segment // 2 - 1
    if last < 0:
        return record
    messages = record.messages[: answers[last] + 1]
    return replace(record, messages=messages, answer=messages[-1].content)
