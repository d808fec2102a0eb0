"""How likely a model finds each way to go on from a context; beginnings that many share are read once."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedloom.data.tokens import IGNORED, Example
from fedloom.evaluation.scoring import evaluating
from fedloom.models.prefix import LEAST, Prefix, read_prefix
from fedloom.objectives.batch import Batch, collate
from fedloom.objectives.forward import Forward


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """Return a mapping with `input_ids`."""
        ...


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text, and one way to go on from it."""

    context: str
    text: str


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of a continuation."""

    logprob: float
    """Of all its tokens together, nats."""
    greedy: bool
    """Whether each is the most likely one."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Row:
    at: int
    """Its place among what was asked."""
    ids: tuple[int, ...]
    """Context and continuation."""
    asked: int
    """Tokens of the continuation, at the end."""


def likelihoods(
    model: nn.Module,
    tokenizer: Encoder,
    asked: Sequence[Continuation],
    *,
    max_length: int,
    batch_size: int = 16,
    share: bool = True,
) -> list[Likelihood]:
    """Return the likelihoods of continuations, in their order.

    Context and continuation are tokenised together, spaces between them with the continuation; what is longer than
    `max_length` tokens loses its beginning.

    Args:
        model: Judges.
        tokenizer: Its own.
        asked: At least one.
        max_length: Tokens that the model reads at most.
        batch_size: Rows that go through it at once.
        share: Whether beginnings that several rows have are read once.

    Raises:
        ValueError: for a continuation without a token, or one that is longer than all there is room for.
    """
    rows = [_row(at, each, tokenizer, max_length) for at, each in enumerate(asked)]
    found: dict[int, Likelihood] = {}
    with evaluating(model):
        for prefix, group in _groups(rows, share=share):
            read = None
            if prefix:
                read = read_prefix(model, torch.tensor(prefix))
            if read is None:
                found.update(_plain(model, group, batch_size))
            else:
                found.update(_from(read, len(prefix), group, batch_size))
    return [found[at] for at in range(len(rows))]


def rolling(model: nn.Module, tokenizer: Encoder, text: str, *, max_length: int) -> float:
    """Return the log-likelihood of a whole text, nats: every token behind as many before it as a window has room for.

    The first is behind the token that begins texts, where the tokenizer has one. Windows of `max_length` follow one
    another; the last one is moved back so that it is full, as perplexities are measured in lm-evaluation-harness.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids or start is None:
        raise ValueError("a text needs at least one token, and a token before it that begins texts")
    total, done = 0.0, 0
    with evaluating(model):
        forward = Forward.of(model)
        while done < len(ids):
            end = min(done + max_length, len(ids))
            # The first token is behind the one that begins texts, the others behind all that the window has room for.
            read = [start, *ids[: end - 1]] if not done else ids[end - max_length - 1 : end - 1]
            asked = torch.tensor(ids[done:end])
            labels = torch.full((1, len(read)), IGNORED)
            labels[0, len(read) - len(asked) :] = asked
            batch = Batch(torch.tensor([read]), None, labels, torch.ones(1))
            total -= float(forward.predictions(batch).losses.sum())
            done = end
    return total


def _row(at: int, each: Continuation, tokenizer: Encoder, max_length: int) -> _Row:
    stripped = each.context.rstrip()
    text = each.context[len(stripped) :] + each.text
    # What a tokenizer puts before every text, without what it puts behind.
    first = list(tokenizer("", add_special_tokens=True)["input_ids"])[:1]
    start = first if first == [tokenizer.bos_token_id] else []
    whole, begun = (
        [*start, *tokenizer(read, add_special_tokens=False)["input_ids"]]
        for read in (stripped + text, stripped)
    )
    asked = len(whole) - len(begun)
    if asked < 1 or not begun:
        raise ValueError(
            f"an answer needs at least one token behind at least one of its question, got {each.text!r} behind"
            f" {each.context[-40:]!r}"
        )
    if asked >= max_length:
        raise ValueError(
            f"an answer of {asked} tokens is longer than the {max_length} that the model reads: {each.text[:40]!r}"
        )
    return _Row(at, tuple(whole[-max_length:]), asked)


def _groups(rows: Sequence[_Row], *, share: bool) -> Iterator[tuple[tuple[int, ...], list[_Row]]]:
    """Yield rows with a beginning that all of them share, which ends before the first token asked for of each."""
    if not share:
        yield (), list(rows)
        return
    left = sorted(rows, key=lambda row: row.ids)
    alone = list[_Row]()
    while left:
        first, *_ = left
        lengths = [_common(first, other) for other in left[1:]]
        # The beginning that saves most tokens; those of sorted rows only become shorter.
        saved = [
            (at * length, length)
            for at, length in enumerate(itertools.accumulate(lengths, min), 1)
            if length >= LEAST
        ]
        if not saved:
            alone.append(left.pop(0))
            continue
        length = max(saved)[1]
        count = 1 + sum(1 for x in itertools.accumulate(lengths, min) if x >= length)
        yield first.ids[:length], left[:count]
        left = left[count:]
    if alone:
        yield (), alone


def _common(a: _Row, b: _Row) -> int:
    """Return how many tokens two rows have alike before those asked for; one of each stays to be read behind them."""
    most = min(len(a.ids) - a.asked, len(b.ids) - b.asked)
    alike = sum(
        1
        for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(a.ids, b.ids, strict=False)
        )
    )
    return min(alike, most)


def _plain(
    model: nn.Module, rows: Sequence[_Row], batch_size: int
) -> Iterator[tuple[int, Likelihood]]:
    forward = Forward.of(model)
    like = next(model.parameters())
    for chosen in _batches(rows, min(batch_size, forward.most_rows(max(map(_length, rows))))):
        batch = collate([[_example(row) for row in chosen]], [1], like, pack=False)
        found = forward.predictions(batch)
        owner = batch.row_of(found.at)
        for at, row in enumerate(chosen):
            own = owner == at
            hits = bool(found.hits[own].all())
            yield row.at, Likelihood(-float(found.losses[own].sum()), hits, row.asked)


def _example(row: _Row) -> Example:
    ids = torch.tensor(row.ids)
    labels = torch.full_like(ids, IGNORED)
    labels[-row.asked :] = ids[-row.asked :]
    return Example(ids, labels, 0)


def _from(
    read: Prefix, length: int, rows: Sequence[_Row], batch_size: int
) -> Iterator[tuple[int, Likelihood]]:
    # Of these the beginning has said everything: one token is asked for behind it.
    at_once = [row for row in rows if len(row.ids) == length + 1]
    if at_once:
        logits = read.logits(read.last[None])
        for row in at_once:
            yield row.at, _judged(logits, row)
    for chosen in _batches([row for row in rows if len(row.ids) > length + 1], batch_size):
        # The last token is asked for, not read.
        states = read.states([torch.tensor(row.ids[length:-1]) for row in chosen])
        for row, own in zip(chosen, states, strict=True):
            behind = torch.cat([read.last[None], own])
            first = len(row.ids) - row.asked - length
            yield row.at, _judged(read.logits(behind[first : first + row.asked]), row)


def _batches(rows: Sequence[_Row], batch_size: int) -> Iterator[Sequence[_Row]]:
    ordered = sorted(rows, key=_length, reverse=True)
    for at in range(0, len(ordered), batch_size):
        yield ordered[at : at + batch_size]


def _length(row: _Row) -> int:
    return len(row.ids)


def _judged(logits: Tensor, row: _Row) -> Likelihood:
    """Return what (asked, vocabulary) logits say of a row's last tokens."""
    targets = torch.tensor(row.ids[-row.asked :], device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    return Likelihood(
        float(logprobs.double().sum()), bool((logits.argmax(-1) == targets).all()), row.asked
    )
