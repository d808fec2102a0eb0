"""Answers that are classes: a classifier decides between the first tokens of their words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.core.protocols import Metrics
from fedloom.data.data_settings import DataSettings
from fedloom.data.encoding import Tokenizer
from fedloom.data.formats import Conversations, Message, Record, to_records
from fedloom.data.readers import Row
from fedloom.data.targets import posed
from fedloom.data.tokens import IGNORED, Example, Tokenised, tokenise
from fedloom.objectives.objective import Score, TokenObjective

_ASKED = (Message("user", "?"),)
"""Stands for a prompt where only the answer's tokens are looked at."""
_WHERE = "objective.classification.classes"


@dataclass(frozen=True, slots=True)
class Classification(TokenObjective):
    """Which class the last answer is, by the model's own head: one token, decided between the classes alone."""

    classes: Mapping[str, str]
    """Each answer that occurs -> the word the model decides for, such as `{alt.atheism: A, comp.graphics: B}`. Words
    must begin with different tokens."""

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to decide."""
        if len(self.classes) < 2 or not all(self.classes.values()):
            raise ValueError(
                f"{_WHERE} must give at least two answers a word each, got {dict(self.classes)}"
            )

    def records(self, rows: Sequence[Row], settings: DataSettings) -> Conversations:
        """Return the conversations with a word in the place of each last answer.

        Raises:
            ValueError: For an answer that is no class.
        """
        found = to_records(rows, settings)
        return replace(found, records=[self._named(record) for record in found.records])

    def examples(
        self, records: Sequence[Record], settings: DataSettings, tokenizer: Tokenizer
    ) -> Tokenised:
        """Return the examples with the first token of each last answer as their only target.

        Raises:
            ValueError: Where two words begin with the same token, or one begins otherwise after its prompt than by
                itself.
        """
        tokens = self.tokens(settings, tokenizer)
        choices = torch.tensor(list(tokens.values()))
        found = tokenise(records, settings, tokenizer, only_last=True)
        made = [tuple(_decided(one, tokens, choices) for one in each) for each in found.examples]
        return replace(found, examples=made)

    def tokens(self, settings: DataSettings, tokenizer: Tokenizer) -> dict[str, int]:
        """Return the first token of every word, in the order of the classes.

        Raises:
            ValueError: Where two words begin with the same token.
        """
        words = list(self.classes.values())
        roomy = replace(settings, max_length=4096)
        tokens: dict[str, int] = {}
        alone = tokenise([posed(_ASKED, settings, word) for word in words], roomy, tokenizer)
        for word, (example, *_) in zip(words, alone.examples, strict=True):
            token = int(example.labels[_answer(example)])
            other = next((known for known in tokens if tokens[known] == token), None)
            if other is not None:
                raise ValueError(
                    f"{_WHERE}: the words {other!r} and {word!r} begin with the same token of this model's"
                    " tokenizer, which could not tell them apart; give one of them another word, such as a letter"
                )
            tokens[word] = token
        return tokens

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """Return loss and perplexity among the classes, and accuracy."""
        found = dict(TokenObjective.metrics(self, scores))
        accuracy = found.pop("token_accuracy")
        return {**found, "accuracy": accuracy}

    def _named(self, record: Record) -> Record:
        *before, last = record.messages
        word = self.classes.get(last.content)
        if word is None:
            raise ValueError(
                f"{record.place}: the answer {last.content[:40]!r} is not among {_WHERE}"
                f" ({', '.join(self.classes)}); add it, or leave its rows out with data.where"
            )
        return replace(record, messages=(*before, replace(last, content=word)), answer=word)


def _decided(example: Example, tokens: Mapping[str, int], choices: Tensor) -> Example:
    assert example.record is not None  # packing comes later
    at, word = _answer(example), example.record.answer
    if int(example.labels[at]) != tokens[word]:
        where = f"{example.record.place}: " if example.record.place else ""
        raise ValueError(
            f"{where}{_WHERE}: the word {word!r} begins with another token after the prompt"
            f" {example.record.messages[0].content[:40]!r} than elsewhere; end the prompt with a line break"
        )
    labels = torch.full_like(example.labels, IGNORED)
    labels[at] = tokens[word]
    return replace(example, labels=labels, choices=choices)


def _answer(example: Example) -> int:
    """Return where the last answer begins."""
    learnt = (example.labels != IGNORED).tolist()
    return max(at for at in range(1, len(learnt)) if learnt[at] and not learnt[at - 1])
