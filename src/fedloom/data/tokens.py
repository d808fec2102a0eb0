"""From conversations to token ids and targets, once and for all; short examples joined into full rows."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Encoder, Pieces, Tokenizer
from fedloom.data.formats import Record
from fedloom.data.rendering import Rendering, make_render, remarks
from fedloom.data.targets import asked, unended, up_to_answer
from fedloom.data.truncation import Shortener

IGNORED = -100
"""The label of a token that is not learnt."""
CHUNK = 1024
"""Conversations tokenised at a time: many enough for a fast tokenizer's threads, few enough for memory."""


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
    choices: Tensor | None = None
    """(choices,) int64: the tokens a target is one of, one tensor for all; None: the whole vocabulary."""
    good: bool | None = None
    """Whether its answer is a wanted one, where answers are compared or judged."""
    rejected: "Example | None" = None
    """Of a pair: the same prompt with the answer that this one's is preferred to; of a selector's, the question with its
    answers in the other order."""
    mismatched: "Example | None" = None
    """The same prompt with the answer to another, where an objective asks for it."""
    reference: Tensor | None = None
    """(targets,) log-likelihoods of the targets under the reference model, nats, once they are known."""
    weight: float = 1.0
    """What its loss is multiplied by in training."""

    @property
    def num_targets(self) -> int:
        """Return how many tokens of its answers are learnt."""
        return sum(row.num_own_targets for row in self.answers)

    @property
    def num_own_targets(self) -> int:
        """Return how many of its ids are learnt; the first of a row has nothing to be predicted from."""
        return int((self.labels[1:] != IGNORED).sum())

    @property
    def answers(self) -> "tuple[Example, ...]":
        """Return the sequences whose answers are learnt from: this one, and the rejected one of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def sequences(self) -> "tuple[Example, ...]":
        """Return all sequences that go through a model."""
        others = [row.mismatched for row in self.answers if row.mismatched is not None]
        return (*self.answers, *others)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all its sequences."""
        return sum(len(row.ids) for row in self.sequences)

    @property
    def key(self) -> bytes:
        """Return what tells it from others that are not the same ids and labels."""
        first = b"/".join(part.numpy().tobytes() for part in (self.ids, self.labels))
        others = [b"/%d/" % (row.good is True) + row.key for row in self.sequences[1:]]
        return first + (b"/good" if self.good else b"") + b"".join(others)


@dataclass(frozen=True, slots=True)
class Tokenised:
    """What became of the records."""

    examples: Sequence[tuple[Example, ...]]
    """Of each record: mostly one; none where the answer was truncated away."""
    num_truncated: int
    """Examples kept that lost some of their prompt or answer, or whole turns."""
    num_dropped: int
    """Examples that lost all of their answer, or would have lost a part where the prompt gives way."""
    num_empty: int = 0
    """Records without an answer to learn."""
    notes: tuple[str, ...] = ()
    """What was done to the text on the way, a line each."""
    prompt: str = ""
    """The prompt that conversations are written in, in words."""
    num_equal: int = 0
    """Pairs whose answers are equal once they are cut to length."""


def tokenise(
    records: Sequence[Record],
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    only_last: bool = False,
) -> Tokenised:
    """Return the examples of every record.

    tokens(prompt) is a prefix of every example. Where the tokenizer would merge across the boundary, the two
    sides are encoded apart; elsewhere the whole text is encoded at once, as the model has seen text before.

    Args:
        records: Conversations.
        settings: How they are written, and how long they may be.
        tokenizer: The model's.
        only_last: Whether of each conversation the last answer alone is learnt.

    Raises:
        ValueError: where the prompt cannot write a record, with the place of its row.
    """
    found = sequences(records, settings, tokenizer, only_last=only_last)
    flat = [each for of_record in found.of_record for each in of_record]
    return Tokenised(
        [
            tuple(example for example, _ in of_record if example is not None)
            for of_record in found.of_record
        ],
        num_truncated=sum(cut and example is not None for example, cut in flat),
        num_dropped=sum(example is None for example, _ in flat),
        num_empty=found.num_empty,
        notes=found.notes,
        prompt=found.prompt,
    )


@dataclass(frozen=True, slots=True)
class Sequences:
    """What became of the records, sequence by sequence."""

    of_record: Sequence[Sequence[tuple[Example | None, bool]]]
    """Of each record: examples, None where no target is left of one, and whether anything was cut."""
    num_empty: int
    """Records without an answer to learn."""
    notes: tuple[str, ...]
    prompt: str


def sequences(
    records: Sequence[Record],
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    only_last: bool = False,
) -> Sequences:
    """Return the sequences of every record, see `tokenise`."""
    render, encoder = make_render(settings, tokenizer), Encoder.of(tokenizer)
    start = [] if render.from_template else _start(tokenizer)
    shorten = Shortener(render, encoder, settings.max_length - len(start))
    records, ends = unended(records, render.ends)
    wanted = [asked(record, only_last=only_last) for record in records]
    made: list[list[tuple[Example | None, bool]]] = []
    noted: list[Rendering] = []
    for first in range(0, len(wanted), CHUNK):
        renderings = [render(one) if one else [] for one in wanted[first : first + CHUNK]]
        noted += [one for of_record in renderings for one in of_record[:1] if one.remarkable]
        pieces = encoder.pieces([one for of_record in renderings for one in of_record])
        for of_record in renderings:
            each = [_examples(one, next(pieces), start, settings, shorten) for one in of_record]
            made.append([example for some in each for example in some])
    num_empty = sum(one is None for one in wanted)
    return Sequences(made, num_empty, remarks(noted, ends), render.prompt)


def _start(tokenizer: Tokenizer) -> list[int]:
    """Return the begin token, where this tokenizer writes one; a chat template writes its own."""
    ids = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    return (
        ids[:1]
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        else []
    )


def _examples(
    rendering: Rendering,
    pieces: Pieces,
    start: list[int],
    settings: DataSettings,
    shorten: Shortener,
) -> list[tuple[Example | None, bool]]:
    """Return each example, None where no target is left of one, and whether anything was cut."""
    over = sum(map(len, pieces)) > settings.max_length - len(start)
    left = (
        shorten(rendering, pieces)
        if over and settings.truncate == "prompt"
        else [(rendering, pieces)]
    )
    return [(_example(*one, start, settings.max_length) if one else None, over) for one in left]


def _example(
    rendering: Rendering, pieces: Pieces, start: list[int], max_length: int
) -> Example | None:
    """Return the example of the tokens there is room for, None where no target is among them."""
    ids: list[int] = list(start)
    labels: list[int] = [IGNORED] * len(start)
    record = rendering.record
    prompt_length = begun = 0
    for segment, piece in zip(rendering.segments, pieces, strict=True):
        if segment.learn:
            if len(ids) >= max_length:
                # What is asked is the last answer that has begun.
                record = up_to_answer(record, begun) if begun else record
                break
            prompt_length = len(ids)
            begun += 1
        ids += piece
        labels += piece if segment.learn else [IGNORED] * len(piece)
    # The first token has nothing to be predicted from; in a packed row it would be another example's end.
    ids, labels = ids[:max_length], [IGNORED, *labels[1:max_length]]
    if all(label == IGNORED for label in labels):
        return None
    return Example(torch.tensor(ids), torch.tensor(labels), min(prompt_length, len(ids)), record)


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Return rows of up to `max_length` tokens, each of whole examples.

    Best fit, longest first. Positions start again at every example, by which attention can keep them apart, and
    the first token of each has no label, so nothing is predicted from another example.
    """
    rows: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        length = len(example.ids)
        at = bisect_left(free, (length, -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = max_length, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(free, (left - length, row))
    return [_row(row) for row in rows]


def _row(examples: Sequence[Example]) -> Example:
    return Example(
        ids=torch.cat([example.ids for example in examples]),
        labels=torch.cat([example.labels for example in examples]),
        prompt_length=0,
        positions=torch.cat([torch.arange(len(example.ids)) for example in examples]),
        choices=examples[0].choices,
    )
