"""Which of two answers is better, asked of the model as a question whose answer is a letter.

Towards Federated RLHF with Aggregated Client Preference for LLMs (FedBis, FedBiscuit). Wu, Liu, Wang, Wang, Su, Gao, ICLR 2025
(arXiv:2407.03038): its binary selector. Deviations: a pair is asked in both orders, in training as in use, so that the place of
an answer decides nothing; the letter is the first token of the model's answer, decided between two, wherever a tokenizer puts
spaces; where there is no room the longest of question and answers gives way, both answers alike.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedloom.core.protocols import Metrics
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.formats import Conversations, Message, Record
from fedloom.data.preferences import check_unpacked, to_pairs
from fedloom.data.readers import Row
from fedloom.data.tokens import Example, Tokenised
from fedloom.objectives.batch import Batch
from fedloom.objectives.classification import Classification
from fedloom.objectives.forward import Forward
from fedloom.objectives.objective import Score, TokenObjective
from fedloom.objectives.preference import mean, prefers

LETTERS = {"A": "A", "B": "B"}
_DECIDED = Classification(LETTERS)
_PLACES = ("{prompt}", "{a}", "{b}")
_SLACK = 8
"""Tokens by which a text may be longer beside others than by itself."""
_SUREST = 1e-12
"""Of a loss, so that log-odds stay finite."""
QUESTION = """Below is a query followed by two responses. Choose the better response. \
State your choice with a single letter: A if response A is better, B if response B is better.

### QUERY
{prompt}

### RESPONSE A
{a}

### RESPONSE B
{b}

### YOUR CHOICE
"""


@dataclass(frozen=True, slots=True)
class SelectorScore(Score):
    """What a model makes of a pair, asked in both orders."""

    margin: float
    """Log-odds of the preferred answer, mean over both orders."""
    firsts: int
    """In how many of the two orders the answer that stands first is chosen."""


@dataclass(frozen=True, slots=True)
class Selector(TokenObjective):
    """Which of two answers is better, by the model's own head: A or B, each pair in both orders."""

    question: str = QUESTION
    """What the model is asked: {prompt}, {a} and {b} stand for the conversation and the two answers."""

    def __post_init__(self) -> None:
        """Refuse a question in which something is missing."""
        missing = [place for place in _PLACES if self.question.count(place) != 1]
        if missing:
            raise ValueError(
                f"objective.selector.question must have {', '.join(_PLACES)} once each, got {self.question!r}"
            )

    @property
    def classes(self) -> Mapping[str, str]:
        """Return the letters: answers are chosen, not written."""
        return LETTERS

    def records(self, rows: Sequence[Row], settings: DataSettings) -> Conversations:
        """Return the pairs that rows hold."""
        return to_pairs(rows, settings)

    def examples(
        self, records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer
    ) -> Tokenised:
        """Return an example for each pair: the question with its answers in both orders.

        Raises:
            ValueError: where a record is no pair, rows shall be packed, or there is no room for the question.
        """
        check_unpacked(settings)
        for record in records:
            if not record.rejected:
                raise ValueError(
                    f"{record.place + ': ' if record.place else ''}a selector compares two answers, got one: its run can"
                    " be evaluated and exported, and `fedloom align` learns from what it prefers; it does not chat"
                )
        shortened = self._shortened(records, settings, tokenizer)
        kept = [at for at, one in enumerate(shortened) if one[1] != one[2]]
        asked = [
            self._asked(records[at], shortened[at], swapped=swapped)
            for at in kept
            for swapped in (False, True)
        ]
        found = _DECIDED.examples(asked, settings, tokenizer)
        made: list[tuple[Example, ...]] = [() for _ in records]
        orders = zip(found.examples[::2], found.examples[1::2], strict=True)
        for at, (one, other) in zip(kept, orders, strict=True):
            if one and other:
                made[at] = (replace(one[0], rejected=other[0]),)
        cut = [texts(record) != short for record, short in zip(records, shortened, strict=True)]
        return replace(
            found,
            examples=made,
            num_truncated=sum(bool(ones) and cut[at] for at, ones in enumerate(made)),
            num_dropped=sum(not made[at] for at in kept),
            num_equal=len(records) - len(kept),
        )

    def batch(
        self, lanes: Sequence[Sequence[Example]], counts: Sequence[int], like: Tensor, *, pack: bool
    ) -> Batch:
        """Return a row for each question, or for several."""
        rows = [[row for example in lane for row in alone(example)] for lane in lanes]
        return TokenObjective.batch(self, rows, counts, like, pack=pack)

    def scores(self, forward: Forward, batch: Batch) -> Sequence[Score]:
        """Return what the model makes of each pair."""
        each = TokenObjective.scores(self, forward, batch)
        return [_both(*orders) for orders in zip(each[::2], each[1::2], strict=True)]

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """Return the loss by question, and how pairs are judged by both orders together."""
        own = [score for score in scores if isinstance(score, SelectorScore)]
        num_questions = sum(score.num_tokens for score in own)
        return {
            "loss": math.fsum(score.loss for score in own) / num_questions,
            "num_pairs": float(len(own)),
            "accuracy": sum(score.correct for score in own) / num_questions,
            "preference_accuracy": mean([prefers(score.margin, 0.0) for score in own]),
            "preference_margin": mean([score.margin for score in own]),
            "first_chosen": sum(score.firsts for score in own) / num_questions,
        }

    def _asked(self, record: Record, parts: Sequence[str], *, swapped: bool) -> Record:
        prompt, chosen, rejected = parts
        first, second = (rejected, chosen) if swapped else (chosen, rejected)
        said = dict(zip(_PLACES, (prompt, first, second), strict=True))
        # At once: an answer may hold what stands for another.
        text = re.sub("|".join(map(re.escape, _PLACES)), lambda m: said[m[0]], self.question)
        letter = "B" if swapped else "A"
        messages = (Message("user", text), Message("assistant", letter))
        return replace(record, messages=messages, answer=letter, rejected="", good=None)

    def _shortened(
        self, records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer
    ) -> list[tuple[str, ...]]:
        """Return prompt, chosen and rejected answer of each record, as long as there is room for."""
        if not records:
            return []
        empty = self._asked(records[0], ("", "", ""), swapped=False)
        roomy = replace(settings, max_length=1 << 16)
        (alone, *_), *_ = _DECIDED.examples([empty], roomy, tokenizer).examples
        room = settings.max_length - len(alone.ids) - _SLACK
        if room < 3 * _SLACK:
            raise ValueError(
                f"data.max_length must be at least {settings.max_length - room + 3 * _SLACK} for this question of"
                f" objective selector, got {settings.max_length}"
            )
        found = [texts(record) for record in records]
        flat = [text for each in found for text in each]
        ids = tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"]
        out = []
        for at, parts in enumerate(found):
            each = ids[3 * at : 3 * at + 3]
            most = _level([len(one) for one in each], room)
            ends = (each[0][-most:], each[1][:most], each[2][:most])
            short = (
                text if len(one) <= most else str(tokenizer.decode(end))
                for text, one, end in zip(parts, each, ends, strict=True)
            )
            out.append(tuple(short))
        return out


def alone(example: Example) -> tuple[Example, ...]:
    """Return the questions of a pair, one by one."""
    assert example.rejected is not None
    return (replace(example, rejected=None), example.rejected)


def texts(record: Record) -> tuple[str, ...]:
    """Return what a pair answers, in words, and its two answers."""
    *before, last = record.messages
    prompt = (
        before[0].content
        if [message.role for message in before] == ["user"]
        else "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in before)
    )
    return prompt, last.content, record.rejected


def _level(lengths: Sequence[int], room: int) -> int:
    """Return the length that the longest are cut to, so that all together take no more than the room."""
    left, many = room, len(lengths)
    for length in sorted(lengths):
        if length * many > left:
            return left // many
        left, many = left - length, many - 1
    return max(lengths)


def _both(one: Score, other: Score) -> SelectorScore:
    """Return the score of a pair from those of its orders: the preferred answer is A in the first, B in the second."""
    return SelectorScore(
        one.loss + other.loss,
        one.correct + other.correct,
        one.num_tokens + other.num_tokens,
        one.choice,
        (_log_odds(one.loss) + _log_odds(other.loss)) / 2,
        (one.choice == 0) + (other.choice == 0),
    )


def _log_odds(loss: float) -> float:
    """Return the log-odds of what is one of two and has this loss."""
    bounded = max(loss, _SUREST)
    return -bounded - math.log(-math.expm1(-bounded))
